"""A .npy file written row by row, under a temporary name until it is whole."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from dist_moe import files
from dist_moe.errors import UsageError


def require_writable(path: Path) -> None:
    """Find out before a long run whether a file can be written; leaves nothing behind.

    Raises:
        UsageError: It cannot.
    """
    NpyRows(path, 0).discard()


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusals to write a file into one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{path}: cannot be written ({reason}): make room or choose another place") from error


def temporary_beside(path: Path) -> Path:
    """A new name in the same directory, for what becomes `path` when it is whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


class NpyRows:
    """A float32 array [rows, columns] whose number of rows is known only at the end.

    Used as a context manager: leaving it normally puts the file in its place, leaving it by an error removes it.
    """

    def __init__(self, path: Path, columns: int) -> None:
        """Create the temporary file beside `path`.

        Raises:
            UsageError: Nothing can be written there, or a directory or device stands there.
        """
        standing = files.kind_of(path)
        if standing not in (None, "file"):
            what = "a directory" if standing == "directory" else "a device or pipe"
            raise UsageError(f"{path} is {what}: name a file")
        self._path = path
        with write_errors(path):
            path = self._path = path.resolve()  # a link stays one
        self._columns = columns
        self._rows = 0
        self._temporary = temporary_beside(path)
        with write_errors(path):
            self._file = self._temporary.open("xb")
            self._write_header()

    def append(self, rows_TV: npt.NDArray[np.float32]) -> None:
        """Write rows [n, columns] behind those written so far; raises UsageError if they cannot be."""
        rows_TV = np.ascontiguousarray(rows_TV, dtype="<f4")
        assert rows_TV.shape[1:] == (self._columns,), rows_TV.shape
        with write_errors(self._path):
            self._file.write(rows_TV.tobytes())
        self._rows += len(rows_TV)

    def discard(self) -> None:
        """Remove the temporary file."""
        with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> NpyRows:
        """Return the file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the file and rename it, or remove it after an error."""
        if kind is not None:
            self.discard()
            return
        try:
            with write_errors(self._path), self._file:
                self._file.seek(0)
                self._write_header()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._temporary.replace(self._path)
        except UsageError:
            self.discard()
            raise

    def _write_header(self) -> None:
        # NumPy pads the header so that the first dimension can grow without moving the data.
        header = {"descr": "<f4", "fortran_order": False, "shape": (self._rows, self._columns)}
        npy_format.write_array_header_1_0(self._file, header)
