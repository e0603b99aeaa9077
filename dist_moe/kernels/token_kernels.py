"""The pieces of a layer's halves, for ranks of which each keeps the residual of some tokens, and tokens as bytes.

Legend: T tokens, D model dim, N rows of a list, K experts per token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_moe.errors import EnvironmentMismatch
from dist_moe.kernels.arrays import I32, I64, U8, F32Array, I32Array, I64Array, U8Array
from dist_moe.kernels.buffers import KvView, Operand
from dist_moe.kernels.formats import OperandParts
from dist_moe.kernels.layer_kernels import AttentionLayer, ExpertsLayer, LayerBuffers, LayerKernels
from dist_moe.kernels.library import lib


class TokenKernels(LayerKernels):
    """The pieces in the chapter "halves of a layer" of dist_moe.h; `own` is a run of the step's tokens."""

    def norm_tokens(self, buffers: LayerBuffers, half: AttentionLayer | ExpertsLayer, own: range) -> None:
        """The operand `normed` of a half, of some tokens: norm of their residual, as the weights read it."""
        assert own.stop <= buffers.max_tokens
        assert half.quantized <= buffers.quantized
        norm_D, parts, layer = half.norm_D, half.normed_parts, half.layer
        lib.dm_norm_tokens(self._context, buffers.struct, buffers.sizes, norm_D, parts, own.start, len(own), layer)

    def route_tokens(self, buffers: LayerBuffers, layer: ExpertsLayer, own: range) -> None:
        """The experts that some tokens pick, and their weights (rule 11); nothing for a dense MLP."""
        assert own.stop <= buffers.max_tokens
        assert layer.experts <= buffers.experts
        lib.dm_route_tokens(self._context, buffers.struct, buffers.sizes, layer.struct, own.start, len(own))

    def group_tokens(self, buffers: LayerBuffers, layer: ExpertsLayer, tokens: int) -> None:
        """The step's choices by expert, and which node computes what of them: a token's part of an expert on one."""
        self._check_room(buffers, layer, tokens)
        lib.dm_group_tokens(self._context, buffers.struct, buffers.sizes, layer.struct, True, tokens)

    @staticmethod
    def list_tokens(row_NT: I32Array, count_N: I32Array, buffers: LayerBuffers) -> None:
        """List the tokens of which each node computes some expert, after `group_tokens`.

        Args:
            row_NT: int32 [nodes, T]; the first count_N of each row are written, ascending.
            count_N: int32 [nodes].
            buffers: Of the step of T tokens.
        """
        nodes, tokens = buffers.picks.nodes, row_NT.shape[1]
        rows, counts = I32.write(row_NT, nodes, tokens), I32.write(count_N, nodes)
        lib.dm_list_tokens(rows, counts, buffers.struct, nodes, tokens)

    def attend(self, buffers: LayerBuffers, layer: AttentionLayer, view: KvView) -> None:
        """As `attention_half`, of the operand `normed` of all tokens."""
        assert view.tokens <= buffers.max_tokens
        lib.dm_attend(self._context, buffers.struct, buffers.sizes, layer.struct, view.struct, view.tokens)

    def add_own_sums(self, buffers: LayerBuffers, half: AttentionLayer | ExpertsLayer, own: range) -> None:
        """As `add_sums`, for some tokens."""
        assert own.stop <= buffers.max_tokens
        x, fault, sums = buffers.residual
        at = own.start * buffers.model_dim
        lib.dm_add_exact(
            self._context,
            x + at,
            fault + own.start,
            sums + at,
            half.bias_D,
            len(own),
            buffers.model_dim,
            half.layer,
        )


class OperandRows:
    """Some tokens' operands as bytes: floats, or int8 and scales, or both."""

    def __init__(self, operand: Operand, parts: OperandParts | int) -> None:
        """These parts of this operand."""
        self._operand, self._parts = operand, int(parts)
        self._struct = operand.for_parts(OperandParts(parts), operand.max_tokens)
        self._row_bytes = int(lib.dm_operand_row_bytes(self._struct, self._parts))

    def bound(self, count: int) -> int:
        """The bytes of so many rows."""
        return count * self._row_bytes

    def pack(self, out: U8Array, row_N: I32Array) -> int:
        """Write rows row_N (int32 [N]) to `out`; returns how many bytes."""
        size = self._check(out, row_N)
        rows = I32.read(row_N, 0)
        lib.dm_pack_operand_rows(U8.write(out, size), self._struct, rows, len(row_N), self._parts)
        return size

    def unpack(self, packed: U8Array, row_N: I32Array) -> None:
        """The inverse."""
        size = self._check(packed, row_N)
        source = U8.read(packed, size)
        lib.dm_unpack_operand_rows(self._struct, source, I32.read(row_N, 0), len(row_N), self._parts)

    def _check(self, data: U8Array, row_N: I32Array) -> int:
        size = self.bound(len(row_N))
        if len(data) < size or (len(row_N) and int(row_N[-1]) >= self._operand.max_tokens):
            raise TypeError(f"{len(row_N)} rows up to {row_N[-1:]} in {len(data)} bytes")
        return size


class SumRows:
    """Some tokens' exact sums as bytes, packed without loss."""

    def __init__(self, sums_TD: I64Array) -> None:
        """Of these sums."""
        self._sums_TD = sums_TD

    def bound(self, count: int) -> int:
        """Most bytes of so many rows."""
        return int(lib.dm_sum_rows_bound(count, self._sums_TD.shape[1]))

    def pack(self, out: U8Array, row_N: I32Array) -> int:
        """Write rows row_N (int32 [N], ascending) to `out`; returns how many bytes."""
        tokens, model_dim = self._check(row_N)
        sums = I64.read(self._sums_TD, tokens, model_dim)
        target = U8.write(out, self.bound(len(row_N)))
        return int(lib.dm_pack_sum_rows(target, sums, I32.read(row_N, 0), len(row_N), model_dim))

    def unpack(self, packed: U8Array, row_N: I32Array) -> None:
        """Add the packed rows to rows row_N."""
        tokens, model_dim = self._check(row_N)
        sums, source = I64.write(self._sums_TD, tokens, model_dim), U8.read(packed, len(packed))
        rows = I32.read(row_N, 0)
        if not lib.dm_add_sum_rows(sums, source, len(packed), rows, len(row_N), model_dim):
            raise EnvironmentMismatch(
                f"{len(packed)} bytes from another host are no {len(row_N)} packed rows of {model_dim} sums: the "
                "network or that host's memory is damaged; check both and start again"
            )

    def _check(self, row_N: I32Array) -> tuple[int, int]:
        tokens, model_dim = self._sums_TD.shape
        if len(row_N) and int(row_N[-1]) >= tokens:
            raise TypeError(f"row {row_N[-1]} of {tokens}")
        return tokens, model_dim


class RoutingRows:
    """Some tokens' experts and their weights as bytes."""

    def __init__(self, ids_TK: I32Array, weights_TK: F32Array) -> None:
        """Of these arrays."""
        self._ids_TK, self._weights_TK = ids_TK, weights_TK
        self._choices = int(ids_TK.shape[1])

    def bound(self, count: int) -> int:
        """The bytes of so many rows."""
        return int(count * 8 * self._choices)

    def pack(self, out: U8Array, row_N: I32Array) -> int:
        """Write rows row_N (int32 [N]) to `out`; returns how many bytes."""
        words_NK = self._words(out, row_N)
        words_NK[:, : self._choices] = self._ids_TK[row_N]
        words_NK[:, self._choices :] = self._weights_TK.view(np.int32)[row_N]
        return int(words_NK.nbytes)

    def unpack(self, packed: U8Array, row_N: I32Array) -> None:
        """The inverse."""
        words_NK = self._words(packed, row_N)
        self._ids_TK[row_N] = words_NK[:, : self._choices]
        self._weights_TK.view(np.int32)[row_N] = words_NK[:, self._choices :]

    def _words(self, data: U8Array, row_N: I32Array) -> npt.NDArray[np.int32]:
        return data[: self.bound(len(row_N))].view(np.int32).reshape(len(row_N), 2 * self._choices)
