"""QW3W's quantized matrices, decoded exactly: `X.scale` with `X.q8` or `X.q4`, and `X.zero_point` in one kind of q4.

Scales belong to rows or to groups of the flattened matrix, which may reach over the ends of rows. Of the two kinds of
q4 only the presence of a zero point tells: (code - 8) * scale, or code * scale + zero_point / 100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe.checkpoint.qw3w_file import DTYPES, F16, F32, I4, I8, DamagedError, Record

Floats = npt.NDArray[np.float32]

PIECE = 1 << 20  # weights that are made f32 at once
ALL = slice(None)
FLOAT_NAMES = {F32: "f32", F16: "f16"}


@dataclass(frozen=True)
class Matrix:
    """A tensor of the model: floats of any shape, or a quantized matrix [rows, columns].

    Attributes:
        kind: "f32", "f16", "qw3w_q8", "qw3w_q4" or "qw3w_q4_zero_point".
        values: The floats, or the codes as they are stored.
        scales: float32 [groups]; None for floats.
        zero_points: int8 [groups]; None unless the kind has them.
        group_size: Weights per scale, as v2 says it; 0 for rows, None if the file does not tell.
    """

    kind: str
    values: Record
    scales: Record | None = None
    zero_points: Record | None = None
    group_size: int | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all that belongs to it."""
        return sum(part.nbytes for part in (self.values, self.scales, self.zero_points) if part is not None)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can have this shape: of 4-bit codes only the number of bytes per row is known."""
        if not self.kind.startswith("qw3w_q4"):
            return self.values.shape == shape
        return len(shape) == 2 and self.values.shape == (shape[0], (shape[1] + 1) // 2)

    def shown_shape(self) -> tuple[int, ...]:
        """The shape as far as the file tells it."""
        *rows, columns = self.values.shape
        return (*rows, 2 * columns) if self.kind.startswith("qw3w_q4") else self.values.shape

    def group(self, shape: tuple[int, ...]) -> int:
        """Weights per scale of a matrix of this shape.

        Raises:
            DamagedError: The number of scales or zero points fits no group size, or not the one that the file tells.
        """
        assert self.scales is not None
        rows, columns = shape
        count, told = self.scales.shape[0], self.group_size
        if told:
            group, expected = told, -(-rows * columns // told)
        else:
            group = columns if count == rows or told == 0 else rows * columns // count
            expected = -(-rows * columns // max(1, group))
        if count != expected:
            size = f"in groups of {told}" if told else "with a scale per row" if told == 0 else "in any groups"
            raise DamagedError(f"has {count} scales for {rows} x {columns} weights {size}")
        if self.zero_points is not None and self.zero_points.shape[0] != count:
            raise DamagedError(f"has {count} scales, but {self.zero_points.shape[0]} zero points")
        return group

    def read(self, shape: tuple[int, ...], rows: slice, columns: slice) -> Floats:
        """A fresh C-contiguous float32 copy of a slice of a quantized matrix of this shape, every value exact."""
        first, stop, _ = rows.indices(shape[0])
        left, right, _ = columns.indices(shape[1])
        found = np.empty((max(0, stop - first), max(0, right - left)), np.float32)
        group, step = self.group(shape), max(1, PIECE // shape[1])
        for row in range(first, stop, step):
            piece = slice(row - first, min(row + step, stop) - first)
            found[piece] = self._rows(row, min(row + step, stop), shape[1], group)[:, columns]
        return found

    def _rows(self, first: int, stop: int, columns: int, group: int) -> Floats:
        assert self.scales is not None
        begin, end = first * columns, stop * columns
        scale = _spread(self.scales.data, group, begin, end)
        with np.errstate(all="ignore"):
            values = self._codes(first, stop, columns).ravel() * scale
            if self.zero_points is not None:
                values += _spread(self.zero_points.data.astype(np.float32) / np.float32(100), group, begin, end)
        return values.reshape(stop - first, columns)

    def _codes(self, first: int, stop: int, columns: int) -> Floats:
        """The integers of rows, as they count for the scale."""
        if self.kind == "qw3w_q8":
            return self.values.data[first:stop].astype(np.float32)
        if self.zero_points is None:
            nibbles = _nibbles(self.values.data[first:stop])[:, :columns]
            return nibbles.astype(np.float32) - np.float32(8)
        # Here two weights share a byte without regard to rows.
        begin, end = first * columns, stop * columns
        nibbles = _nibbles(self.values.data.ravel()[begin // 2 : -(-end // 2)])
        return nibbles[begin % 2 : begin % 2 + end - begin].astype(np.float32)


def matrices(records: Mapping[str, Record]) -> dict[str, Matrix]:
    """The tensors of a file by their names; each quantized one's records are put together.

    Raises:
        DamagedError: Some of a quantized tensor's records are missing or of another type than they must be.
    """
    found: dict[str, Matrix] = {}
    for name, record in records.items():
        stem, _, ending = name.rpartition(".")
        if ending in ("q8", "q4"):
            found[stem] = _quantized(stem, ending, record, records)
        elif ending not in ("scale", "zero_point") or not {f"{stem}.q8", f"{stem}.q4"} & set(records):
            if record.dtype not in FLOAT_NAMES:
                raise DamagedError(f"{name} has integers, but is neither .q8 nor .q4")
            found[name] = Matrix(FLOAT_NAMES[record.dtype], record)
    return found


def _quantized(stem: str, ending: str, codes: Record, records: Mapping[str, Record]) -> Matrix:
    scales, zeros = records.get(f"{stem}.scale"), records.get(f"{stem}.zero_point")
    if scales is None:
        raise DamagedError(f"{stem}.{ending} has no {stem}.scale")
    if stem in records or f"{stem}.{'q4' if ending == 'q8' else 'q8'}" in records:
        raise DamagedError(f"it has {stem} in two forms")
    if ending == "q8" and zeros is not None:
        raise DamagedError(f"{stem}.q8 has a {stem}.zero_point, as only .q4 may have one")
    parts = [(ending, codes, I8 if ending == "q8" else I4, 2), ("scale", scales, F32, 1)]
    parts += [] if zeros is None else [("zero_point", zeros, I8, 1)]
    for part, record, dtype, dimensions in parts:
        if record.dtype != dtype or len(record.shape) != dimensions:
            raise DamagedError(
                f"{stem}.{part} has dtype {record.dtype} and {len(record.shape)} dimensions, expected dtype {dtype}"
                f" ({np.dtype(DTYPES[dtype]).name}) and {dimensions}"
            )
    kind = f"qw3w_{ending}" if zeros is None else "qw3w_q4_zero_point"
    return Matrix(kind, codes, scales, zeros, codes.group_size)


def _spread(values: npt.NDArray[np.generic], group: int, begin: int, end: int) -> Floats:
    """The value of each weight's group, for weights [begin, end) of a flattened matrix."""
    starts = np.arange(begin // group, -(-end // group)) * group
    lengths = np.minimum(starts + group, end) - np.maximum(starts, begin)
    return np.repeat(np.asarray(values[begin // group : -(-end // group)], np.float32), lengths)


def _nibbles(data: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The 4-bit numbers of bytes along the last axis, the low half first."""
    pairs = np.stack((data & np.uint8(15), data >> np.uint8(4)), axis=-1)
    return pairs.reshape(*data.shape[:-1], -1)
