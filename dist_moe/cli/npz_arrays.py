"""Arrays that grow row by row in bounded memory and become one .npz file at the end, which is whole or absent."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from dist_moe.files import NewFile, require_writable, write_errors


class NpzArrays:
    """Arrays [rows, ...] that grow together, and a few small ones that are known at the begin.

    Used as a context manager: leaving it normally writes the file, leaving it by an error leaves nothing behind.
    Until then the rows lie in nameless files beside it, which the system frees even if the process is killed.
    """

    def __init__(self, path: Path, fixed: Mapping[str, npt.NDArray[Any]]) -> None:
        """Prepare an empty record.

        Raises:
            UsageError: Nothing can be written there.
        """
        require_writable(path)
        self._path = path.resolve()  # a link stays one
        self._fixed = fixed
        self._parts: dict[str, _GrowingArray] = {}

    def append(self, rows: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write rows behind those written so far: by array the same names, types and shapes each time.

        Raises:
            UsageError: The disk is full.
        """
        with write_errors(self._path):
            for name, part_rows in rows.items():
                if name not in self._parts:
                    self._parts[name] = _GrowingArray(self._path.parent, part_rows)
                self._parts[name].append(part_rows)

    def __enter__(self) -> NpzArrays:
        """Return the arrays themselves."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the file together and rename it, or drop everything after an error."""
        try:
            if kind is None:
                self._write()
        finally:
            for part in self._parts.values():
                part.close()

    def _write(self) -> None:
        with NewFile(self._path) as file:
            with write_errors(self._path):
                self._write_archive(file.stream)
            file.commit()

    def _write_archive(self, file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, array in self._fixed.items():
                with archive.open(f"{name}.npy", "w") as entry:
                    npy_format.write_array(entry, array, allow_pickle=False)
            for name, part in self._parts.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    part.copy_to(entry)


class _GrowingArray:
    """The rows of one array in a nameless file."""

    def __init__(self, directory: Path, like: npt.NDArray[Any]) -> None:
        self._dtype = like.dtype.newbyteorder("<")
        self._row_shape = like.shape[1:]
        self._rows = 0
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  closed by its owner

    def append(self, rows: npt.NDArray[Any]) -> None:
        assert rows.shape[1:] == self._row_shape, rows.shape
        self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self._rows += len(rows)

    def copy_to(self, entry: IO[bytes]) -> None:
        shape = (self._rows, *self._row_shape)
        header = {"descr": npy_format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        npy_format.write_array_header_1_0(entry, header)
        self._file.seek(0)
        shutil.copyfileobj(self._file, entry, 1 << 20)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
            self._file.close()
