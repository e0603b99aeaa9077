"""Attention of this rank's query heads.

Shape suffixes: T tokens, D model dim, h local query heads, g local KV heads, P head dim, R = (h + 2 g) P.
Source: transformers' Qwen3MoeAttention.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import KvView
from dist_moe.model.share import Share
from dist_moe.model.weights import AttentionWeights
from dist_moe.model.workspace import Workspace


def attention_sums(
    share: Share, weights: AttentionWeights, buffers: Workspace, cache: KvView, layer: int
) -> npt.NDArray[np.int64]:
    """o_proj(attend(rope(norm(q)), rope(norm(k)), v)) of the normed residual, summed over the local heads.

    Returns:
        int64 [T, D] in units of 2^-32, partial: to be summed over ranks.
    """
    kernels, config = share.kernels, share.config
    T, P = len(buffers.x_TD), config.head_dim
    h, g = len(share.plan.heads), len(share.plan.kv_heads)
    k_column, v_column = h * P, (h + g) * P
    fault_T, normed, attended, qkv_TR = buffers.fault_T, buffers.normed, buffers.attended, buffers.qkv_TR

    kernels.rmsnorm(normed.x_TC[:T], buffers.x_TD, weights.norm_D, config.eps)
    if share.quantized:
        kernels.quantize(normed, fault_T, T, layer)
    kernels.matmul(qkv_TR, weights.qkv, normed, T, share.format, share.group_size)
    if weights.qkv_bias is not None:
        kernels.add_bias(qkv_TR, 0, weights.qkv_bias)

    kernels.norm_rope(qkv_TR, 0, h, weights.q_norm_P, buffers.cos_TP, buffers.sin_TP, config.eps)
    kernels.norm_rope(qkv_TR, k_column, g, weights.k_norm_P, buffers.cos_TP, buffers.sin_TP, config.eps)
    kernels.kv_store(cache, fault_T, qkv_TR, k_column, v_column, g, P, layer)
    kernels.attention(attended.x_TC[:T], fault_T, qkv_TR, cache, share.kv_of_h, config.score_scale, g, P, layer)

    if share.quantized:
        kernels.quantize(attended, fault_T, T, layer)
    kernels.unit_sums(
        buffers.sums_TD, fault_T, weights.o_units, attended, T, P, share.format, share.output_group, layer
    )
    return buffers.sums_TD
