"""The buffers of a step, allocated once: nothing in a step's path allocates per token.

Shape suffixes: T tokens, D model dim, P head dim, h local query heads, g local KV heads, E experts, K experts per
token, N = T * K choices, v local vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import CHUNK_WORDS, GROUP, ChunkList, LayerBuffers, LayerSizes, Operand, Picks, aligned_empty
from dist_moe.model.share import Share
from dist_moe.model.step import MAX_LOGIT_ROWS
from dist_moe.model_config import ModelConfig
from dist_moe.parallel.plan import Plan

Floats = npt.NDArray[np.float32]
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Workspace:
    """Every intermediate of a step of at most `max_tokens` tokens, on one rank."""

    max_tokens: int
    x_TD: Floats
    fault_T: Int32s
    normed: Operand  # the norm's output, of D columns
    attended: Operand  # attention's output, of h P columns
    qkv_TR: Floats  # [T, (h + 2 g) P]
    cos_TP: Floats
    sin_TP: Floats
    sums_TD: Int64s
    router_TE: Floats
    ids_TK: Int32s
    weights_TK: Floats
    offset_E1: Int32s
    token_N: Int32s
    weight_N: Floats
    chunks: ChunkList
    work_L2: Int64s  # chunks that this rank computed in each layer, and products of a chunk with a token
    head_x_ND: Floats  # the residual of the rows whose logits are needed
    head: Operand
    head_fault_N: Int32s
    logits_Nv: Floats

    def of_a_layer(self, sizes: LayerSizes, picks: Picks) -> LayerBuffers:
        """What a layer works in, as its kernels take it."""
        return LayerBuffers(
            sizes,
            x_TD=self.x_TD,
            sums_TD=self.sums_TD,
            fault_T=self.fault_T,
            normed=self.normed,
            attended=self.attended,
            qkv_TR=self.qkv_TR,
            cos_TP=self.cos_TP,
            sin_TP=self.sin_TP,
            router_TE=self.router_TE,
            ids_TK=self.ids_TK,
            weights_TK=self.weights_TK,
            offset_E1=self.offset_E1,
            token_N=self.token_N,
            weight_N=self.weight_N,
            chunks=self.chunks,
            picks=picks,
            work_L2=self.work_L2,
        )


def make_workspace(share: Share, *, max_tokens: int, max_chunks: int) -> Workspace:
    """Allocate the buffers of one rank.

    Args:
        share: This rank's share.
        max_tokens: Tokens of the largest step.
        max_chunks: Chunks of the layer that has most.
    """
    config, plan, quantized = share.config, share.plan, share.quantized
    T, D, P = max_tokens, config.model_dim, config.head_dim
    E, K = max(config.experts, 1), max(config.experts_per_token, 1)
    columns = (len(plan.heads) + 2 * len(plan.kv_heads)) * P
    floats, ints = np.float32, np.int32
    return Workspace(
        max_tokens=T,
        x_TD=aligned_empty((T, D), floats),
        fault_T=aligned_empty((T,), ints),
        normed=Operand(T, D, quantized),
        attended=Operand(T, len(plan.heads) * P, quantized),
        qkv_TR=aligned_empty((T, columns), floats),
        cos_TP=aligned_empty((T, P // 2), floats),
        sin_TP=aligned_empty((T, P // 2), floats),
        sums_TD=aligned_empty((T, D), np.int64),
        router_TE=aligned_empty((T, E), floats),
        ids_TK=aligned_empty((T, K), ints),
        weights_TK=aligned_empty((T, K), floats),
        offset_E1=aligned_empty((E + 1,), ints),
        token_N=aligned_empty((T * K,), ints),
        weight_N=aligned_empty((T * K,), floats),
        chunks=ChunkList(max_chunks),
        work_L2=np.zeros((config.layers, 2), np.int64),
        head_x_ND=aligned_empty((MAX_LOGIT_ROWS, D), floats),
        head=Operand(MAX_LOGIT_ROWS, D, quantized),
        head_fault_N=aligned_empty((MAX_LOGIT_ROWS,), ints),
        logits_Nv=aligned_empty((MAX_LOGIT_ROWS, plan.vocabulary_rows), floats),
    )


def workspace_bytes(config: ModelConfig, plan: Plan, *, quantized: bool, max_tokens: int, max_chunks: int) -> int:
    """Bytes of what `make_workspace` allocates for the same arguments, without allocating it."""
    T, D, P = max_tokens, config.model_dim, config.head_dim
    E, K, N = max(config.experts, 1), max(config.experts_per_token, 1), MAX_LOGIT_ROWS
    h, g = len(plan.heads), len(plan.kv_heads)
    floats = T * (D + (h + 2 * g) * P + 2 * (P // 2) + E + K) + T * K + N * (D + plan.vocabulary_rows)
    ints = T + T * K + (E + 1) + T * K + N
    operands = _operand_bytes(T, D, quantized) + _operand_bytes(T, h * P, quantized) + _operand_bytes(N, D, quantized)
    return 4 * (floats + ints) + 8 * T * D + 8 * CHUNK_WORDS * max_chunks + 16 * config.layers + operands


def _operand_bytes(vectors: int, columns: int, quantized: bool) -> int:
    groups = -(-columns // GROUP)
    return vectors * (4 * columns + (groups * (GROUP + 8) if quantized else 0))
