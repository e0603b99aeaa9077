"""Writing one file of a store: in order, under a temporary name, synced, then renamed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt

from dist_moe.checkpoint.safetensors_file import FileLayout
from dist_moe.errors import PlaceError
from dist_moe.store.checksum import RunningChecksum, bytes_of, checksum_text
from dist_moe.store.manifest import StoreFile

PARTIAL_SUFFIX = ".partial"

# Bounds what a crash can lose, and how long the last sync of a large file takes.
_SYNC_BYTES = 256 << 20

# Written in whole blocks of a huge page, a file stays in huge pages where the file system can (ext4, xfs), and its
# mapping streams 10 to 15 % faster than one of 4 KB pages.
_BLOCK_BYTES = 2 << 20

# What may wait to be written while more is made.
_WAITING_BYTES = 64 << 20


def partial_name(name: str) -> str:
    """The temporary name of a file that is being written."""
    return f".{name}{PARTIAL_SUFFIX}"


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors while writing into one PlaceError that says how to go on."""
    try:
        yield
    except OSError as error:
        raise PlaceError(
            f"{path}: cannot be written ({error.strerror or error}); the store is incomplete, and the same command "
            "continues it: make room, allow writing"
        ) from None


class FileWriter:
    """A file that appears under its name only when it is complete.

    A thread of its own writes, so that more can be made meanwhile. Use as a context manager; what is not finished by
    then is removed.
    """

    def __init__(self, directory: Path, name: str, on_written: Callable[[int], None]) -> None:
        """Open the temporary file.

        Args:
            directory: The store.
            name: The final name.
            on_written: Called with every number of bytes written.

        Raises:
            PlaceError: The file cannot be created.
        """
        self._path = directory / name
        self._partial = directory / partial_name(name)
        self._on_written = on_written
        self._checksum = RunningChecksum()
        self._header = b""
        self._block = bytearray()
        self._unsynced_bytes = 0
        self._finished = False
        self._waiting = deque[tuple[int, Future[None]]]()
        self._waiting_bytes = 0
        self.position = 0
        with write_errors(self._path):
            self._file = self._partial.open("wb", buffering=0)
        self._thread = ThreadPoolExecutor(1, "store-writer")

    def write_header(self, layout: FileLayout) -> None:
        """Write the header of a safetensors file; comes first."""
        assert self.position == 0
        self._header = layout.header
        self.write(layout.header)

    def write(self, data: bytes | npt.NDArray[Any]) -> None:
        """Append bytes, which must not change any more; raises PlaceError if earlier ones cannot be written."""
        view = bytes_of(data)
        self._settle(max(0, _WAITING_BYTES - len(view)))
        self._waiting.append((len(view), self._thread.submit(self._append, view)))
        self._waiting_bytes += len(view)
        self.position += len(view)
        self._on_written(len(view))

    def pad_to(self, position: int) -> None:
        """Append zeros until the file has `position` bytes."""
        assert 0 <= position - self.position < 4096
        if position > self.position:
            self.write(bytes(position - self.position))

    def finish(self, nonfinite: Mapping[str, int]) -> StoreFile:
        """Sync the file, give it its name, and return its entry in the manifest."""
        self._settle(0)
        with write_errors(self._path):
            self._flush(len(self._block))
            self._sync()
            self._file.close()
            self._partial.replace(self._path)
            sync_directory(self._path.parent)
        self._finished = True
        return StoreFile(
            name=self._path.name,
            file_bytes=self.position,
            header_bytes=len(self._header),
            header_checksum=checksum_text(self._header),
            checksum=self._checksum.text(),
            nonfinite=dict(nonfinite),
        )

    def __enter__(self) -> FileWriter:
        """Return the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the temporary file unless `finish` was reached."""
        self._thread.shutdown(cancel_futures=True)
        if not self._finished:
            with write_errors(self._path):
                try:
                    self._file.close()
                finally:
                    self._partial.unlink(missing_ok=True)

    def _settle(self, left_bytes: int) -> None:
        """Wait until at most so many bytes wait to be written."""
        while self._waiting and self._waiting_bytes > left_bytes:
            count, done = self._waiting.popleft()
            self._waiting_bytes -= count
            with write_errors(self._path):
                done.result()

    def _append(self, view: memoryview) -> None:
        """Add bytes to the block that is being filled, and write it whenever it is full; on the writing thread."""
        for first in range(0, len(view), _BLOCK_BYTES):
            self._block += view[first : first + _BLOCK_BYTES]
            if len(self._block) >= _BLOCK_BYTES:
                self._flush(_BLOCK_BYTES)
            if self._unsynced_bytes >= _SYNC_BYTES:
                self._sync()
        self._checksum.update(view)

    def _flush(self, count: int) -> None:
        """Write the first `count` bytes that wait."""
        with memoryview(self._block) as waiting:
            written = 0
            while written < count:
                written += self._file.write(waiting[written:count])
        del self._block[:count]
        self._unsynced_bytes += count

    def _sync(self) -> None:
        os.fdatasync(self._file.fileno())
        self._unsynced_bytes = 0


def write_text(directory: Path, name: str, text: str | bytes) -> None:
    """Replace a small file in one step; raises PlaceError if that fails."""
    with FileWriter(directory, name, lambda _: None) as file:
        file.write(text.encode() if isinstance(text, str) else text)
        file.finish({})


def sync_directory(directory: Path) -> None:
    """Make renames and removals in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
