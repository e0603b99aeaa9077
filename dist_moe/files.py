"""What stands at a path: the system's refusal to say so becomes one sentence."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

from dist_moe.errors import UsageError

Kind = Literal["file", "directory", "pipe", "other"]


def kind_of(path: Path) -> Kind | None:
    """What stands at a path, links followed; None if there is nothing.

    `Path.is_file` and its like raise some of the system's errors and hide others, by version of Python.

    Raises:
        UsageError: The system does not say: a directory on the way is closed, or the name is too long.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  one call for all versions of Python
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be looked at ({error.strerror}): check the name and the permissions of its directories"
        ) from error
    except ValueError as error:  # a NUL, or half a surrogate pair
        raise UsageError(f"{str(path)!r} cannot be the name of a file ({error}): choose another one") from error
    return kind_of_mode(mode)


def kind_of_mode(mode: int) -> Kind:
    """What a `st_mode` stands for."""
    kinds: dict[int, Kind] = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe"}
    return kinds.get(stat.S_IFMT(mode), "other")


def is_file(path: Path) -> bool:
    """Whether a regular file stands at a path; raises UsageError as `kind_of`."""
    return kind_of(path) == "file"


def is_directory(path: Path) -> bool:
    """Whether a directory stands at a path; raises UsageError as `kind_of`."""
    return kind_of(path) == "directory"


def exists(path: Path) -> bool:
    """Whether anything stands at a path; raises UsageError as `kind_of`."""
    return kind_of(path) is not None


def is_same(one: Path, other: Path) -> bool:
    """Whether two names are of one file; False if either names nothing."""
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


def read_bytes(path: Path) -> bytes:
    """The contents of a small file.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error


def require_writable(path: Path) -> None:
    """Find out before a long run whether a file can be written; leaves nothing behind; UsageError as `NewFile`."""
    NewFile(path).discard()


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusals to write a file into one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{path}: cannot be written ({reason}): make room or choose another place") from error


class NewFile:
    """A file that appears under its name when it is whole; until then, and after an error, what stood there stays.

    Used as a context manager: leaving it without `commit` removes what was written.

    Attributes:
        stream: For those who write by other means; inside `write_errors`.
    """

    def __init__(self, path: Path, *, private: bool = False) -> None:
        """Create a temporary file beside `path`.

        Args:
            path: Where it will be.
            private: Let its owner alone read it.

        Raises:
            UsageError: Nothing can be written there, or a directory or device stands there.
        """
        standing = kind_of(path)
        if standing not in (None, "file"):
            raise UsageError(f"{path} is a {standing if standing == 'directory' else 'device or pipe'}: name a file")
        with write_errors(path):
            self._path = path.resolve()  # a link stays one
            self._temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.tmp")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self.stream: BinaryIO = os.fdopen(os.open(self._temporary, flags, 0o600 if private else 0o666), "wb")

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; raises UsageError if they cannot be written."""
        with write_errors(self._path):
            self.stream.write(data)

    def commit(self, header: bytes = b"") -> None:
        """Overwrite the first bytes by `header`, sync, and give the file its name; raises UsageError if that fails."""
        with write_errors(self._path):
            self.stream.seek(0)
            self.stream.write(header)
            self.stream.flush()
            os.fsync(self.stream.fileno())
            self.stream.close()
            self._temporary.replace(self._path)

    def discard(self) -> None:
        """Remove what was not committed."""
        with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
            self.stream.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> NewFile:
        """Return the file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was not committed."""
        self.discard()
