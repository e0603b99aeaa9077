"""The experts of a layer that this rank computes; a dense MLP is one expert that every token picks with weight 1.

Shape suffixes: T tokens, D model dim, E experts, K experts per token, N = T * K choices.
Source: transformers' Qwen3MoeSparseMoeBlock.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_moe.model.share import Share
from dist_moe.model.weights import ExpertWeights
from dist_moe.model.workspace import Workspace
from dist_moe.parallel.plan import shared_chunks


def expert_sums(share: Share, weights: ExpertWeights, buffers: Workspace, layer: int) -> npt.NDArray[np.int64]:
    """Sum over experts of weight * down(silu(gate(x)) * up(x)), x the normed residual, over this rank's chunks.

    Returns:
        int64 [T, D] in units of 2^-32, partial: to be summed over ranks.
    """
    kernels = share.kernels
    T = len(buffers.x_TD)
    kernels.rmsnorm(buffers.normed.x_TC[:T], buffers.x_TD, weights.norm_D, share.config.eps)
    if share.quantized:
        kernels.quantize(buffers.normed, buffers.fault_T, T, layer)

    choices = _route(share, weights, buffers, layer)
    offset_E1 = buffers.offset_E1[: weights.experts + 1]
    count = _pick_chunks(share, weights, buffers, offset_E1)
    kernels.experts(
        buffers.sums_TD,
        buffers.fault_T,
        buffers.chunks,
        count,
        buffers.token_N[:choices],
        buffers.weight_N[:choices],
        buffers.normed,
        T,
        weights.width,
        share.format,
        share.group_size,
        layer,
    )
    return buffers.sums_TD


def _route(share: Share, weights: ExpertWeights, buffers: Workspace, layer: int) -> int:
    """Fill the step's lists of tokens and weights by expert; returns N, the number of choices."""
    kernels, config = share.kernels, share.config
    T = len(buffers.x_TD)
    if weights.router is None:
        buffers.offset_E1[:2] = (0, T)
        buffers.token_N[:T] = np.arange(T)
        buffers.weight_N[:T] = 1.0
        return T
    N = T * config.experts_per_token
    kernels.matmul(buffers.router_TE, weights.router, buffers.normed, T, share.router_format, 0)
    kernels.route(buffers.ids_TK, buffers.weights_TK, buffers.fault_T, buffers.router_TE, config.norm_topk_prob, layer)
    kernels.group_by_expert(
        buffers.offset_E1, buffers.token_N[:N], buffers.weight_N[:N], buffers.ids_TK, buffers.weights_TK
    )
    return N


def _pick_chunks(share: Share, weights: ExpertWeights, buffers: Workspace, offset_E1: npt.NDArray[np.int32]) -> int:
    """List this rank's chunks of the experts that got tokens; returns how many."""
    tokens_E = np.diff(offset_E1).astype(np.int64)
    if weights.owned is None:
        picked = shared_chunks(tokens_E, weights.chunks_per_expert, share.plan.rank, share.plan.ranks)
    else:
        picked = weights.owned[tokens_E[weights.owned // weights.chunks_per_expert] > 0]
    expert = picked // weights.chunks_per_expert
    buffers.chunks.set(weights.addresses[picked], offset_E1[expert], tokens_E[expert])
    return len(picked)
