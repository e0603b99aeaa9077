"""Kernels of the mixture of experts: routing, grouping, expert chunks.

Legend: T tokens, D model dim, E experts, K experts per token, N entries of the lists grouped by expert. See native.py.
"""

from __future__ import annotations

from dist_moe.kernels.arrays import F32, I32, I64, F32Array, I32Array, I64Array
from dist_moe.kernels.buffers import ChunkList, Operand
from dist_moe.kernels.context import Context
from dist_moe.kernels.library import lib


class ExpertKernels(Context):
    """The chapter "experts" of dist_moe.h."""

    def route(
        self,
        ids_TK: I32Array,
        weights_TK: F32Array,
        fault_T: I32Array,
        logits_TE: F32Array,
        norm_topk_prob: bool,
        layer: int,
        tokens: int | None = None,
    ) -> None:
        """The K best experts and their weights for `tokens` rows of logits_TE, best first (rule 11)."""
        experts, chosen, tokens = logits_TE.shape[1], ids_TK.shape[1], len(logits_TE) if tokens is None else tokens
        ids, weights = I32.write(ids_TK, tokens, chosen), F32.write(weights_TK, tokens, chosen)
        fault, logits = I32.write(fault_T, tokens), F32.read(logits_TE, tokens, experts)
        lib.dm_route(self._context, ids, weights, fault, logits, tokens, experts, chosen, norm_topk_prob, layer)

    def group_by_expert(
        self,
        offset_E1: I32Array,
        token_N: I32Array,
        weight_N: F32Array,
        ids_TK: I32Array,
        weights_TK: F32Array,
        tokens: int | None = None,
    ) -> None:
        """Sort the choices of `tokens` rows of ids_TK by expert: e's tokens, ascending, are entries [e, e + 1) of it.

        offset_E1 is int32 [E + 1]; token_N (int32) and weight_N (float32) hold at least tokens * K entries.
        """
        chosen, tokens = ids_TK.shape[1], len(ids_TK) if tokens is None else tokens
        offset, token = I32.write(offset_E1, len(offset_E1)), I32.write(token_N, tokens * chosen)
        weight = F32.write(weight_N, tokens * chosen)
        ids, weights = I32.read(ids_TK, tokens, chosen), F32.read(weights_TK, tokens, chosen)
        lib.dm_group_by_expert(self._context, offset, token, weight, ids, weights, tokens, len(offset_E1) - 1, chosen)

    def experts(
        self,
        sums_TD: I64Array,
        fault_T: I32Array,
        chunks: ChunkList,
        chunk_count: int,
        token_N: I32Array,
        weight_N: F32Array,
        operand: Operand,
        tokens: int,
        width: int,
        layer: int,
    ) -> None:
        """The exact int64 sum over chunks of weight * down(silu(gate x) * up x) (rules 6 and 7).

        Args:
            sums_TD: int64 [T, D], overwritten, with zeros where no chunk contributes.
            fault_T: int32 [T].
            chunks: Chunks of `width` hidden units, each with its run of the two lists below.
            chunk_count: How many of them to compute.
            token_N: int32, the operand's row of every entry.
            weight_N: float32, the routing weight of every entry.
            operand: The normalised hidden states, [T, D].
            tokens: T.
            width: Hidden units per chunk.
            layer: For the faults.
        """
        columns = operand.columns
        if chunk_count > chunks.capacity or token_N.shape != weight_N.shape:
            raise TypeError(f"{chunk_count} of {chunks.capacity} chunks, lists {token_N.shape} and {weight_N.shape}")
        sums, fault = I64.write(sums_TD, tokens, columns), I32.write(fault_T, tokens)
        token, weight = I32.read(token_N, 0), F32.read(weight_N, 0)
        x = operand.for_parts(chunks.normed_parts, tokens)
        lib.dm_experts(
            self._context,
            sums,
            fault,
            chunks.struct,
            token,
            weight,
            x,
            chunk_count,
            tokens,
            columns,
            width,
            layer,
        )
