"""Packing lists of matrices, and the choice of their scales.

Legend: R matrix rows, C matrix columns. See native.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_moe.kernels.arrays import F32, U64, Array, F32Array, Pointer, U8Array, address_of, require_packed
from dist_moe.kernels.context import Context
from dist_moe.kernels.formats import ScaleChoice, WeightFormat, packed_bytes
from dist_moe.kernels.library import ffi, lib


@dataclass(frozen=True)
class PackMatrix:
    """One matrix of a list that is packed at once.

    Attributes:
        packed: Receives exactly `packed_bytes(format, rows, columns, group)` bytes.
        weights_RC: float32, or bf16 as uint16; rows may lie apart. What it lacks of `rows` and `columns` is 0.
        rows: Rows of the packed matrix.
        columns: Its columns.
        group: Weights per scale, 0 for a whole row.
        scale_R: The scales of whole rows when group = 0, float32 [rows]; None takes them from the rows given.
        importance_C: How much each column's squared error counts in ScaleChoice.MSE, float32; None: all the same.
    """

    packed: U8Array
    weights_RC: Array
    rows: int
    columns: int
    group: int
    scale_R: F32Array | None = None
    importance_C: F32Array | None = None


class PackKernels(Context):
    """Lists of matrices of the chapter "packed weights" of dist_moe.h."""

    def row_scales(
        self,
        scale_R: F32Array,
        weights_RC: F32Array,
        fmt: WeightFormat,
        scales: ScaleChoice = ScaleChoice.ABSMAX,
        importance_C: F32Array | None = None,
    ) -> None:
        """The f16 scale of every whole row as float32 [R], which `pack` needs for slices of rows when group = 0."""
        (rows, columns), stride = weights_RC.shape, row_stride(weights_RC)
        importance = ffi.NULL if importance_C is None else F32.read(importance_C, columns)
        out, weights = F32.write(scale_R, rows), strided(weights_RC)
        lib.dm_row_scales(self._context, out, weights, importance, rows, columns, stride, fmt, scales)

    def pack_matrices(
        self, matrices: Sequence[PackMatrix], fmt: WeightFormat, scales: ScaleChoice = ScaleChoice.ABSMAX
    ) -> list[int]:
        """Pack all matrices, spread over the threads by tiles; returns for each what `pack` returns."""
        bad_N = np.zeros(len(matrices), np.uint64)
        items = ffi.new("dm_pack_matrix[]", [_item(matrix, fmt) for matrix in matrices])
        lib.dm_pack_matrices(self._context, U64.write(bad_N, len(matrices)), items, len(matrices), fmt, scales)
        counts: list[int] = bad_N.tolist()
        return counts


def _item(matrix: PackMatrix, fmt: WeightFormat) -> tuple[Pointer, ...]:
    weights = matrix.weights_RC
    rows, columns = weights.shape
    item_bytes = weights.dtype.itemsize
    if weights.dtype not in (np.float32, np.uint16) or weights.strides[1] != item_bytes or not weights.flags.aligned:
        raise TypeError(f"expected float32 or bf16 rows without gaps, got {weights.dtype} {weights.strides}")
    if rows > matrix.rows or columns > matrix.columns or weights.strides[0] % item_bytes or weights.strides[0] < 0:
        raise TypeError(f"a matrix of {matrix.rows} x {matrix.columns} cannot hold {weights.shape} {weights.strides}")
    require_packed(matrix.packed, packed_bytes(fmt, matrix.rows, matrix.columns, matrix.group))
    return (
        ffi.from_buffer(matrix.packed, require_writable=True),
        ffi.cast("void *", address_of(weights)),
        ffi.NULL if matrix.scale_R is None else F32.read(matrix.scale_R, matrix.rows),
        ffi.NULL if matrix.importance_C is None else F32.read(matrix.importance_C, matrix.columns),
        matrix.rows,
        matrix.columns,
        rows,
        columns,
        weights.strides[0] // item_bytes,
        matrix.group,
        weights.dtype == np.uint16,
    )


def row_stride(weights_RC: F32Array) -> int:
    """Floats from one row to the next of a matrix whose rows have no gaps."""
    row_bytes, item_bytes = weights_RC.strides
    if weights_RC.dtype != np.float32 or item_bytes != 4 or row_bytes % 4 or row_bytes < 0:
        raise TypeError(f"expected float32 rows without gaps, got {weights_RC.dtype} with strides {weights_RC.strides}")
    return row_bytes // 4


def strided(weights_RC: F32Array) -> Pointer:
    """A pointer to such a matrix."""
    return ffi.cast("float *", address_of(weights_RC))
