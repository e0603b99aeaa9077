"""A .npy file written row by row, under a temporary name until it is whole."""

from __future__ import annotations

import io
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from dist_moe.files import NewFile


class NpyRows:
    """A float32 array [rows, columns] whose number of rows is known only at the end.

    Used as a context manager: leaving it normally puts the file in its place, leaving it by an error removes it.
    """

    def __init__(self, path: Path, columns: int) -> None:
        """Create the temporary file beside `path`.

        Raises:
            UsageError: Nothing can be written there, or a directory or device stands there.
        """
        self._columns = columns
        self._rows = 0
        self._file = NewFile(path)
        self._file.write(self._header())

    def append(self, rows_TV: npt.NDArray[np.float32]) -> None:
        """Write rows [n, columns] behind those written so far; raises UsageError if they cannot be."""
        rows_TV = np.ascontiguousarray(rows_TV, dtype="<f4")
        assert rows_TV.shape[1:] == (self._columns,), rows_TV.shape
        self._file.write(rows_TV.tobytes())
        self._rows += len(rows_TV)

    def __enter__(self) -> NpyRows:
        """Return the file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the file and rename it, or remove it after an error."""
        with self._file:
            if kind is None:
                self._file.commit(self._header())

    def _header(self) -> bytes:
        # NumPy pads the header so that the first dimension can grow without moving the data.
        header = io.BytesIO()
        shape = (self._rows, self._columns)
        npy_format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return header.getvalue()
