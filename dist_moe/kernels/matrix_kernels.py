"""Kernels on packed weights and on hidden states: pack, embed, norm, quantize, matrix products.

Legend: T tokens, D model dim, P head dim, V vocabulary, R matrix rows, C matrix columns. See native.py.
"""

from __future__ import annotations

import numpy as np

from dist_moe.kernels.arrays import (
    F32,
    I32,
    I64,
    U8,
    U16,
    Array,
    F32Array,
    I32Array,
    I64Array,
    U8Array,
    columns_pointer,
    require_packed,
)
from dist_moe.kernels.buffers import MatrixList, Operand
from dist_moe.kernels.context import Context
from dist_moe.kernels.formats import OperandParts, WeightFormat, packed_bytes
from dist_moe.kernels.library import ffi, lib
from dist_moe.kernels.pack_kernels import row_stride, strided


class MatrixKernels(Context):
    """The chapters "packed weights", "vectors" and "matrices" of dist_moe.h."""

    # ---- packed weights ----

    def pack(
        self, packed: U8Array, weights_RC: F32Array, scale_R: F32Array | None, fmt: WeightFormat, group: int
    ) -> int:
        """Pack float32 [R, C], whose rows may lie apart, into exactly `packed_bytes(fmt, R, C, group)` bytes.

        `scale_R` gives whole rows' scales when group = 0; None takes them from the rows given.

        Returns:
            How many weights are NaN or infinite, plus how many scales exceed f16.
        """
        (rows, columns), stride = weights_RC.shape, row_stride(weights_RC)
        require_packed(packed, packed_bytes(fmt, rows, columns, group))
        scale = ffi.NULL if scale_R is None else F32.read(scale_R, rows)
        out, weights = ffi.from_buffer(packed, require_writable=True), strided(weights_RC)
        return int(lib.dm_pack(self._context, out, weights, scale, rows, columns, stride, fmt, group))

    def unpack(self, weights_RC: F32Array, packed: U8Array, fmt: WeightFormat, group: int) -> None:
        """The values float32 [R, C] that the kernels compute with."""
        rows, columns = weights_RC.shape
        require_packed(packed, packed_bytes(fmt, rows, columns, group))
        out = F32.write(weights_RC, rows, columns)
        lib.dm_unpack(self._context, out, U8.read(packed, len(packed)), rows, columns, fmt, group)

    # ---- vectors ----

    def embed(self, x_TD: F32Array, table_VD: Array, ids_T: I32Array) -> None:
        """Rows `ids_T` (int32 [T]) of a table, float32 or bf16 as uint16 [V, D]; TypeError for an id beyond it."""
        (rows, columns), tokens = table_VD.shape, len(ids_T)
        if tokens and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < rows:
            raise TypeError(f"token ids {int(ids_T.min())} ... {int(ids_T.max())} in a table of {rows} rows")
        is_bf16 = table_VD.dtype == np.uint16
        out, ids = F32.write(x_TD, tokens, columns), I32.read(ids_T, tokens)
        table = (U16 if is_bf16 else F32).read(table_VD, rows, columns)
        lib.dm_embed(self._context, out, table, ids, tokens, columns, is_bf16)

    def rmsnorm(
        self, out_TD: F32Array, x_TD: F32Array, gain_D: F32Array, eps: float | np.float32, tokens: int | None = None
    ) -> None:
        """Norm: out = x / sqrt(mean(x^2) + eps) * gain for `tokens` rows of x_TD (rule 4); out_TD may be x_TD."""
        columns, tokens = x_TD.shape[1], len(x_TD) if tokens is None else tokens
        out, x = F32.write(out_TD, tokens, columns), F32.read(x_TD, tokens, columns)
        lib.dm_rmsnorm(self._context, out, x, F32.read(gain_D, columns), eps, tokens, columns)

    def quantize(self, operand: Operand, fault_T: I32Array, tokens: int, layer: int) -> None:
        """Fill the operand's int8 part from x_TC (rule 5); an operand without one is left alone."""
        if operand.quantized:
            x = operand.for_parts(OperandParts.INT8, tokens)
            lib.dm_quantize(self._context, x, I32.write(fault_T, tokens), tokens, layer)

    def add_exact(
        self,
        x_TD: F32Array,
        fault_T: I32Array,
        sums_TD: I64Array,
        bias_D: F32Array | None,
        layer: int,
        tokens: int | None = None,
    ) -> None:
        """Residual: x += f32((sums + bias) * 2^-32) for `tokens` rows of x_TD (rule 7); sums are int64 fixed point."""
        columns, tokens = x_TD.shape[1], len(x_TD) if tokens is None else tokens
        x, fault = F32.write(x_TD, tokens, columns), I32.write(fault_T, tokens)
        bias = ffi.NULL if bias_D is None else F32.read(bias_D, columns)
        lib.dm_add_exact(self._context, x, fault, I64.read(sums_TD, tokens, columns), bias, tokens, columns, layer)

    # ---- matrices ----

    def matmul(self, out_TR: F32Array, matrices: MatrixList, operand: Operand, tokens: int) -> None:
        """Columns out_column... of out_TR = matrix @ operand, for every matrix; other columns are left alone."""
        stride = out_TR.shape[1]
        if matrices.out_columns > stride:
            raise TypeError(f"matrices fill {matrices.out_columns} columns, the output has {stride}")
        out, x = F32.write(out_TR, tokens, stride), operand.for_parts(matrices.parts, tokens)
        weights = matrices.for_columns(operand.columns)
        lib.dm_matmul(self._context, out, weights, x, matrices.count, tokens, stride)

    def add_bias(self, out_TR: F32Array, first_column: int, bias_R: F32Array, tokens: int | None = None) -> None:
        """Add a bias to columns [first_column, first_column + len(bias_R)) of `tokens` rows of out_TR."""
        stride, rows, tokens = out_TR.shape[1], len(bias_R), len(out_TR) if tokens is None else tokens
        out = columns_pointer(out_TR, tokens, first_column, rows)
        lib.dm_add_bias(self._context, out, F32.read(bias_R, rows), tokens, rows, stride)

    def unit_sums(
        self,
        sums_TD: I64Array,
        fault_T: I32Array,
        units: MatrixList,
        operand: Operand,
        tokens: int,
        head_dim: int,
        layer: int,
    ) -> None:
        """o_proj: the exact int64 sum over units of unit @ its head's columns of the operand (rule 7).

        Unit u is a packed [D, P] in groups of at most P and reads columns [u * P, (u + 1) * P).
        """
        columns = sums_TD.shape[1]
        if operand.columns != units.count * head_dim or not units.row_counts <= {columns}:
            raise TypeError(f"{units.count} units [{columns}, {head_dim}] cannot read {operand.columns} columns")
        sums, fault = I64.write(sums_TD, tokens, columns), I32.write(fault_T, tokens)
        weights, x = units.for_columns(head_dim), operand.for_parts(units.parts, tokens)
        lib.dm_unit_sums(self._context, sums, fault, weights, x, units.count, tokens, columns, head_dim, layer)
