"""Reading .npz files that somebody else may have written or damaged: whatever they cause becomes one sentence."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from dist_moe import files
from dist_moe.errors import UsageError


@contextmanager
def open_npz(path: Path, what: str, advice: str) -> Iterator[zipfile.ZipFile]:
    """The archive, inside which ValueError, TypeError and LookupError mean that it is not what it should be.

    Args:
        path: The file.
        what: What it should be, e.g. "the profile of a model's routing".
        advice: How to make one.

    Raises:
        UsageError: There is no such file, it cannot be read, or it is something else.
    """
    if (kind := files.kind_of(path)) != "file":
        found = "there is no such file" if kind is None else "it is not a file"
        raise UsageError(f"{path}: expected {what} (.npz), but {found}: {advice}")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}): check it") from error
    except (zipfile.BadZipFile, zlib.error, RuntimeError, LookupError, ValueError, TypeError, EOFError) as error:
        raise UsageError(f"{path}: not {what} ({error}): {advice}") from error


def read_array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """A whole array."""
    with archive.open(f"{name}.npy") as stream:
        array: npt.NDArray[Any] = npy_format.read_array(stream, allow_pickle=False)
    return array


@dataclass(frozen=True)
class RowStream:
    """An array [rows, ...] that is read from its first row to its last, a few at a time."""

    stream: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def open(cls, archive: zipfile.ZipFile, name: str) -> RowStream:
        """Read its header."""
        stream = archive.open(f"{name}.npy")
        npy_format.read_magic(stream)
        shape, _, dtype = npy_format.read_array_header_1_0(stream)
        return cls(stream, shape, dtype)

    def read(self, rows: int) -> npt.NDArray[Any]:
        """The next rows; ValueError if there are not so many."""
        row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        data = self.stream.read(rows * row_bytes)
        return np.frombuffer(data, self.dtype).reshape(rows, *self.shape[1:])
