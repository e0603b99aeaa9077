"""The numerics contract's rule 10 bit for bit, in NumPy: one float32 operation at a time, in the order that it says.

S positions, h query heads, P head dim, j groups of 32 dims. Kernels must equal this, not come close to it.
"""

from __future__ import annotations

import numpy as np

from dist_moe.kernels import KvFormat, reference
from dist_moe.kernels.reference_scales import fma

BLOCK = 64
F32 = np.float32


def exp(x):
    """Rule 4's exponential of x <= 0."""
    clamped = np.maximum(x, F32(-87))
    shifted = fma(clamped, F32(float.fromhex("0x1.715476p0")), F32(1.5 * 2**23))
    n = shifted - F32(1.5 * 2**23)
    r = fma(n, F32(float.fromhex("-0x1.63p-1")), clamped)
    r = fma(n, F32(float.fromhex("0x1.bd0106p-13")), r)
    p = np.full_like(r, F32(1.9875691500e-4))
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        p = fma(p, r, F32(c))
    return np.where(x < -87, F32(0), np.ldexp(p, n.astype(np.int32)).astype(F32))


def lane_sum(x_hS):
    """Rule 4's sum: 16 lanes by index, then lanes i + 8, + 4, + 2, + 1."""
    padded = np.zeros((len(x_hS), -(-x_hS.shape[1] // 16) * 16), F32)
    padded[:, : x_hS.shape[1]] = x_hS
    lanes = np.zeros((len(x_hS), 16), F32)
    for first in range(0, padded.shape[1], 16):
        lanes = lanes + padded[:, first : first + 16]
    for width in (8, 4, 2, 1):
        lanes = lanes[:, :width] + lanes[:, width : 2 * width]
    return lanes[:, 0]


def scores(q_hP, k_hSP, fmt):
    """Unscaled scores [h, S]: one chain over the dims, or over groups of 32 of them for q8."""
    h, S, P = k_hSP.shape
    score_hS = np.zeros((h, S), F32)
    if fmt != KvFormat.Q8:
        for p in range(P):
            score_hS = fma(q_hP[:, p, None], k_hSP[:, :, p], score_hS)
        return score_hS
    q, q_scale, _ = reference.quantize(q_hP)
    k, k_scale, _ = reference.quantize(k_hSP.reshape(h * S, P))
    for j in range(q_scale.shape[1]):
        group = slice(32 * j, 32 * j + 32)
        dot_hS = np.einsum("hp,hsp->hs", q[:, group].astype(np.int64), k.reshape(h, S, -1)[..., group].astype(np.int64))
        factor_hS = k_scale.reshape(h, S, -1)[..., j] * q_scale[:, j, None]
        score_hS = fma(factor_hS, dot_hS.astype(F32), score_hS)
    return score_hS


def cached_values(v_hSP, fmt):
    """V as the cache gives it back, float32."""
    if fmt == KvFormat.F32:
        return v_hSP
    if fmt == KvFormat.F16:
        return v_hSP.astype(np.float16).astype(F32)
    h, S, P = v_hSP.shape
    q, scale, _ = reference.quantize(v_hSP.reshape(h * S, P))
    values = np.repeat(scale, 32, axis=1) * q.astype(F32)
    return values[:, :P].reshape(h, S, P)


def attention(q_hP, k_SgP, v_SgP, kv_of_h, scale, fmt):
    """One token's output [h, P] over its S positions of unnarrowed K and V."""
    k_hSP = np.ascontiguousarray(k_SgP.swapaxes(0, 1)[kv_of_h])
    v_hSP = cached_values(np.ascontiguousarray(v_SgP.swapaxes(0, 1)[kv_of_h]), fmt)
    if fmt == KvFormat.F16:
        k_hSP = k_hSP.astype(np.float16).astype(F32)
    score_hS = scores(q_hP, k_hSP, fmt) * scale
    m = total = o = None
    for first in range(0, score_hS.shape[1], BLOCK):
        block_hS = score_hS[:, first : first + BLOCK]
        block_m = block_hS.max(axis=1)
        weight_hS = exp(block_hS - block_m[:, None])
        block_sum, block_o = lane_sum(weight_hS), np.zeros(q_hP.shape, F32)
        for i in range(block_hS.shape[1]):
            block_o = fma(weight_hS[:, i, None], v_hSP[:, first + i], block_o)
        if m is None:
            m, total, o = block_m, block_sum, block_o
            continue
        top = np.maximum(m, block_m)
        alpha, beta = exp(m - top), exp(block_m - top)
        total = fma(block_sum, beta, total * alpha)
        o = fma(block_o, beta[:, None], o * alpha[:, None])
        m = top
    return o / total[:, None]
