"""Kernels without packed weights, with their float64 definitions: norms, rotation, attention, routing, sampling.

Legend: T tokens, S positions, D model dim, h query heads, g KV heads, P head dim, E experts, K experts per token,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dist_moe.kernels import (
    Kernels,
    KvFormat,
    KvView,
    Operand,
    SamplingParameters,
    aligned_empty,
    kv_block_bytes,
    reference,
)
from dist_moe.kernels.arrays import F32Array
from dist_moe.verify.calls import no_faults
from dist_moe.verify.check import Arrays
from dist_moe.verify.family import ROUNDING, Family, Random

_T, _D, _S, _H, _G, _P, _E, _K, _V = 9, 130, 150, 6, 2, 48, 40, 4, 1000
_EPS = np.float32(1e-6)
_VALID = _V - 9


def vector_families() -> Iterator[Family]:
    """Every family."""
    yield _rmsnorm()
    yield _quantize()
    yield _add_exact()
    yield _rope()
    for fmt in KvFormat:
        yield _attention(fmt)
    for norm in (True, False):
        yield _route(norm)
    yield _vocabulary()
    yield _draw()
    yield Family("self-test of all primitives", "", _self_test, lambda found: found, None)


def _self_test(kernels: Kernels) -> Arrays:
    return (np.array([kernels.self_test()], np.uint64),)


def _rmsnorm() -> Family:
    random = Random("rmsnorm")
    x_TD, gain_D = random.floats(_T, _D, scale=3.0), random.floats(_D)

    def run(kernels: Kernels) -> Arrays:
        out_TD = np.full(x_TD.shape, np.nan, np.float32)
        kernels.rmsnorm(out_TD, x_TD, gain_D, _EPS)
        return (out_TD,)

    return Family("rmsnorm", "", run, lambda _: (reference.rmsnorm(x_TD, gain_D, float(_EPS)),), ROUNDING)


def _quantize() -> Family:
    x_TD = Random("quantize").floats(_T, _D)

    def run(kernels: Kernels) -> Arrays:
        operand = Operand(_T, _D, quantized=True)
        operand.x_TC[...] = x_TD
        kernels.quantize(operand, no_faults(_T), _T, 0)
        return operand.q_TC, operand.scale_TG, operand.sum_TG

    return Family("int8 activations", "", run, lambda _: reference.quantize(x_TD), None)


def _add_exact() -> Family:
    x_TD = Random("add").floats(_T, _D)
    sums_TD = np.random.default_rng(7).integers(-(2**50), 2**50, (_T, _D))

    def run(kernels: Kernels) -> Arrays:
        out_TD = x_TD.copy()
        kernels.add_exact(out_TD, no_faults(_T), sums_TD, None, 0)
        return (out_TD,)

    return Family("residual", "", run, lambda _: (x_TD + reference.from_fixed_point(sums_TD),), None)


def _rope() -> Family:
    random = Random("rope")
    rows_TR, gain_P = random.floats(_T, _H * _P, scale=4.0), random.floats(_P)
    position_T = np.array([0, 1, 2, 63, 64, 4096, 40959, 131071, 1048575], np.int64)
    inv_freq_P = (1e6 ** -(np.arange(_P // 2) / (_P // 2))).astype(np.float32)

    def run(kernels: Kernels) -> Arrays:
        cos_TP, sin_TP = (np.full((_T, _P // 2), np.nan, np.float32) for _ in range(2))
        kernels.rope_angles(cos_TP, sin_TP, position_T, inv_freq_P, 1.0)
        out_TR = rows_TR.copy()
        kernels.norm_rope(out_TR, 0, _H, gain_P, cos_TP, sin_TP, _EPS)
        return cos_TP, sin_TP, out_TR

    def define(_: Arrays) -> Arrays:
        cos_TP, sin_TP = reference.rope_angles(position_T, inv_freq_P, 1.0)
        normed_ThP = reference.rmsnorm(rows_TR.reshape(_T, _H, _P), gain_P, float(_EPS))
        return cos_TP, sin_TP, reference.rotate(normed_ThP, cos_TP, sin_TP).reshape(_T, -1)

    return Family("norm and rotation of heads", "", run, define, ROUNDING)


def _attention(fmt: KvFormat) -> Family:
    rows_SR = Random("attention").floats(_S, (_H + 2 * _G) * _P)
    kv_of_h = np.arange(_H, dtype=np.int32) // (_H // _G)
    scale = np.float32(_P**-0.5)

    def run(kernels: Kernels) -> Arrays:
        blocks = [aligned_empty(_G * kv_block_bytes(fmt, _P), np.uint8) for _ in range(-(-_S // 64))]
        for block in blocks:
            block.fill(0)
        view, fault_S = KvView(blocks, np.zeros(_S, np.int64), np.arange(_S), 0, fmt), no_faults(_S)
        kernels.kv_store(view, fault_S, rows_SR, _H * _P, (_H + _G) * _P, _G, _P, 0)
        out_SC = np.full((_S, _H * _P), np.nan, np.float32)
        kernels.attention(out_SC, fault_S, rows_SR, view, kv_of_h, scale, _G, _P, 0)
        return (out_SC, np.stack(blocks))

    def define(_: Arrays) -> Arrays:
        q_ShP, k_SgP, v_SgP = heads_of(rows_SR, fmt)
        out = [
            reference.attention(q_ShP[s], k_SgP[: s + 1], v_SgP[: s + 1], kv_of_h, float(scale)).ravel()
            for s in range(_S)
        ]
        return (np.stack(out),)

    return Family("attention", f"{fmt.label} cache", run, define, ROUNDING, lambda found: found[:1])


def heads_of(rows_SR: F32Array, fmt: KvFormat) -> Arrays:
    """Q, K and V [S, heads, P] as the kernels see them; q8 scores take an int8 query."""
    q, k, v = (np.ascontiguousarray(part) for part in np.split(rows_SR, [_H * _P, (_H + _G) * _P], axis=1))
    q_kind = KvFormat.Q8 if fmt == KvFormat.Q8 else KvFormat.F32
    return (
        reference.narrow(q.reshape(_S, _H, _P), q_kind),
        reference.narrow(k.reshape(_S, _G, _P), fmt),
        reference.narrow(v.reshape(_S, _G, _P), fmt),
    )


def _route(norm: bool) -> Family:
    logits_TE = Random("route").floats(_T, _E, scale=3.0)

    def run(kernels: Kernels) -> Arrays:
        ids_TK, weights_TK = np.full((_T, _K), -1, np.int32), np.full((_T, _K), np.nan, np.float32)
        kernels.route(ids_TK, weights_TK, no_faults(_T), logits_TE, norm, 0)
        return ids_TK, weights_TK

    return Family(
        "routing", "weights of 1" if norm else "softmax", run, lambda _: reference.route(logits_TE, _K, norm), ROUNDING
    )


def _blocks(kernels: Kernels, logits_TV: F32Array, temperature: float) -> tuple[F32Array, F32Array]:
    shape = (len(logits_TV), -(-_V // 128))
    max_TB, sum_TB = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    temperature_T = np.full(len(logits_TV), temperature, np.float32)
    kernels.vocabulary_blocks(max_TB, sum_TB, no_faults(len(logits_TV)), logits_TV, temperature_T, _VALID, 0)
    return max_TB, sum_TB


def _vocabulary() -> Family:
    logits_TV = Random("logits").floats(_T, _V, scale=3.0)

    def define(_: Arrays) -> Arrays:
        blocks = [reference.vocabulary_blocks(row_V, 0.7, _VALID) for row_V in logits_TV]
        return np.stack([largest for largest, _ in blocks]), np.stack([total for _, total in blocks])

    return Family("sums over the vocabulary", "", lambda kernels: _blocks(kernels, logits_TV, 0.7), define, ROUNDING)


def _draw() -> Family:
    logits_TV = Random("draw").floats(_T, _V, scale=3.0)

    def run(kernels: Kernels) -> Arrays:
        max_TB, sum_TB = _blocks(kernels, logits_TV, 0.7)
        ids_TV, best_TV = np.full((_T, _V), -1, np.int32), np.full((_T, _V), np.nan, np.float32)
        kernels.top_logits(ids_TV, best_TV, logits_TV, max_TB, np.arange(max_TB.shape[1], dtype=np.int32), _VALID)
        drawn_T = np.full(_T, -1, np.int64)
        for t in range(_T):
            how = SamplingParameters(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01, seed=11, position=t)
            ids_N, best_N = ids_TV[t, :_VALID].copy(), best_TV[t, :_VALID].copy()
            place, _ = kernels.sample(how, ids_N, best_N, max_TB[t], sum_TB[t], complete=True)
            drawn_T[t] = ids_N[place]
        return ids_TV[:, :_VALID].copy(), drawn_T

    def define(_: Arrays) -> Arrays:
        ranked_TV = np.stack([reference.ranked(row_V, _VALID) for row_V in logits_TV]).astype(np.int32)
        drawn = []
        for t, row_V in enumerate(logits_TV):
            ids_N, p_N = reference.kept_tokens(row_V, _VALID, 0.7, 50, 0.9, 0.01)
            place = int(np.searchsorted(np.cumsum(p_N), reference.uniform(11, 0, t), side="right"))
            drawn.append(int(ids_N[min(place, len(ids_N) - 1)]))
        return ranked_TV, np.array(drawn, np.int64)

    return Family("candidates and draw", "", run, define, None)
