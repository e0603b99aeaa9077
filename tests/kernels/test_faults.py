"""A NaN ends its own sequence: only that token gets a fault, with the layer and the kind (NUMERICS rule 15).

T tokens, D model dim, C columns, P head dim, E experts, V vocabulary. Token 1 of 3 is the bad one everywhere.
"""

import numpy as np
import pytest

from dist_moe.kernels import (
    NO_FAULT,
    ChunkFormat,
    ChunkFormats,
    ChunkList,
    FaultKind,
    KvFormat,
    KvView,
    MatrixFormat,
    MatrixList,
    Operand,
    WeightFormat,
    address_of,
    kv_block_bytes,
)

LAYER = 37
T, BAD = 3, 1
NOT_NUMBERS = [np.nan, -np.nan, np.inf, -np.inf]
TOO_LARGE = [2.0**18, -(2.0**18), 1e30]
OTHERS = [t for t in range(T) if t != BAD]


def alike(fmt):
    return ChunkFormats([ChunkFormat(MatrixFormat(fmt, 32), MatrixFormat(fmt, 32))])


def only_token_1(fault_T, kind):
    return fault_T.tolist() == [NO_FAULT, LAYER << 8 | kind, NO_FAULT]


def test_numbers_of_the_header():
    from dist_moe.kernels._native import lib

    assert NO_FAULT == lib.DM_NO_FAULT
    for kind in FaultKind:
        assert getattr(lib, f"DM_FAULT_{kind.name}") == kind


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("column", [0, 31, 32, 39])
def test_quantizer(kernels, bench, same_bits, value, column):
    x_TC = bench.floats(T, 40)
    good = bench.operand(kernels, x_TC, quantized=True)
    operand, fault_T = Operand(T, 40, True), bench.faults(T)
    operand.x_TC[...] = x_TC
    operand.x_TC[BAD, column] = value
    kernels.quantize(operand, fault_T, T, LAYER)
    assert only_token_1(fault_T, FaultKind.QUANTIZER)
    for mine, others in ((operand.q_TC, good.q_TC), (operand.scale_TG, good.scale_TG), (operand.sum_TG, good.sum_TG)):
        same_bits(mine[OTHERS], others[OTHERS])


def test_the_lowest_fault_is_kept(kernels, bench):
    operand = Operand(T, 40, True)
    operand.x_TC[...] = np.nan
    fault_T = bench.of(np.array([LAYER << 8 | 6, (LAYER - 1) << 8 | 6, LAYER << 8], np.int32))
    kernels.quantize(operand, fault_T, T, LAYER)
    assert fault_T.tolist() == [LAYER << 8 | FaultKind.QUANTIZER, (LAYER - 1) << 8 | 6, LAYER << 8]


def store(kernels, bench, fmt, rows_TR, P):
    blocks = [bench.empty(kv_block_bytes(fmt, P), np.uint8) for _ in range(T)]
    for block in blocks:
        block.fill(0xFF)
    view = KvView(blocks, np.arange(T), np.zeros(T, np.int64), 0, fmt)
    fault_T = bench.faults(T)
    kernels.kv_store(view, fault_T, rows_TR, 0, P, 1, P, LAYER)
    return blocks, view, fault_T


KV_CASES = [(fmt, value) for fmt in KvFormat for value in NOT_NUMBERS] + [
    (KvFormat.F16, 65520.0),
    (KvFormat.F16, -1e6),
]


@pytest.mark.parametrize("column", [0, 33, 64, 127])  # of K, K, V, V
@pytest.mark.parametrize(("fmt", "value"), KV_CASES)
def test_keys_and_values(kernels, bench, same_bits, fmt, value, column):
    P = 64
    rows_TR = bench.floats(T, 2 * P)
    good, _, none_T = store(kernels, bench, fmt, rows_TR, P)
    assert (none_T == NO_FAULT).all()
    rows_TR[BAD, column] = value
    blocks, view, fault_T = store(kernels, bench, fmt, rows_TR, P)
    assert only_token_1(fault_T, FaultKind.KEY_VALUE)
    for t in OTHERS:
        same_bits(blocks[t], good[t])
    # Attention after it runs to its end, for the others as if nothing had happened.
    out_TC, again_T = bench.empty((T, P), np.float32), bench.faults(T)
    q_TC = bench.floats(T, P)
    kernels.attention(out_TC, again_T, q_TC, view, np.zeros(1, np.int32), 0.125, 1, P, LAYER)
    assert again_T[OTHERS].tolist() == [NO_FAULT] * 2
    assert np.isfinite(out_TC[OTHERS]).all()


def test_largest_f16_is_no_fault(kernels, bench):
    rows_TR = bench.of(np.full((T, 64), np.nextafter(np.float32(65520), np.float32(0))))
    _, _, fault_T = store(kernels, bench, KvFormat.F16, rows_TR, 32)
    assert (fault_T == NO_FAULT).all()


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_queries_of_a_q8_cache(kernels, bench, same_bits, value):
    P = 64
    rows_TR, q_TC = bench.floats(T, 2 * P), bench.floats(T, P)
    _, view, _ = store(kernels, bench, KvFormat.Q8, rows_TR, P)
    out_TC, fault_T = bench.empty((2, T, P), np.float32), bench.faults(T)
    kernels.attention(out_TC[0], fault_T, q_TC, view, np.zeros(1, np.int32), 0.125, 1, P, LAYER)
    assert (fault_T == NO_FAULT).all()
    q_TC[BAD, 40] = value
    kernels.attention(out_TC[1], fault_T, q_TC, view, np.zeros(1, np.int32), 0.125, 1, P, LAYER)
    assert only_token_1(fault_T, FaultKind.QUANTIZER)
    same_bits(out_TC[1][OTHERS], out_TC[0][OTHERS])


@pytest.mark.parametrize("value", NOT_NUMBERS + TOO_LARGE)
def test_contributions_of_heads(kernels, bench, same_bits, value):
    D = P = 17
    unit = bench.packed(kernels, bench.of(np.eye(D, dtype=np.float32)), WeightFormat.F32, 0)
    operand, sums_TD, fault_T = Operand(T, 2 * P, False), bench.empty((2, T, D), np.int64), bench.faults(T)
    operand.x_TC[...] = bench.floats(T, 2 * P)
    units = MatrixList([(unit, D, 0, MatrixFormat(WeightFormat.F32, 0))] * 2)
    kernels.unit_sums(sums_TD[0], fault_T, units, operand, T, P, LAYER)
    assert (fault_T == NO_FAULT).all()
    operand.x_TC[BAD, P + 16] = value
    kernels.unit_sums(sums_TD[1], fault_T, units, operand, T, P, LAYER)
    assert only_token_1(fault_T, FaultKind.CONTRIBUTION)
    same_bits(sums_TD[1][OTHERS], sums_TD[0][OTHERS])
    fault_T = bench.faults(T)
    operand.x_TC[BAD, P + 16] = -np.nextafter(np.float32(2.0**18), np.float32(0))  # the largest one allowed
    kernels.unit_sums(sums_TD[1], fault_T, units, operand, T, P, LAYER)
    assert (fault_T == NO_FAULT).all()


@pytest.mark.parametrize("value", NOT_NUMBERS + TOO_LARGE)
def test_contributions_of_experts(kernels, bench, same_bits, value):
    D, fmt = 3, WeightFormat.F32
    gate_FD, down_DF = np.zeros((32, D), np.float32), np.zeros((D, 32), np.float32)
    gate_FD[0, 0] = down_DF[2, 0] = 1
    parts = [bench.packed(kernels, bench.of(m), fmt, 0) for m in (gate_FD, gate_FD, down_DF)]
    chunk, listed = bench.of(np.concatenate(parts)), ChunkList(2)
    listed.set(np.full(2, address_of(chunk), np.uint64), alike(fmt), np.array([0, 1]), np.array([1, 2]))
    token_N, weight_N = bench.of(np.array([0, 1, 2], np.int32)), bench.of(np.array([1, 1, 1], np.float32))
    operand, sums_TD, fault_T = Operand(T, D, False), bench.empty((2, T, D), np.int64), bench.faults(T)
    operand.x_TC[...] = 2
    arguments = (listed, 2, token_N, weight_N, operand, T, 32, LAYER)
    kernels.experts(sums_TD[0], fault_T, *arguments)
    assert (fault_T == NO_FAULT).all()
    weight_N[1] = value
    kernels.experts(sums_TD[1], fault_T, *arguments)
    assert only_token_1(fault_T, FaultKind.CONTRIBUTION)
    same_bits(sums_TD[1][OTHERS], sums_TD[0][OTHERS])


@pytest.mark.parametrize("scale", [np.nan, np.inf, 1e30])
def test_hidden_units_of_quantized_experts(kernels, bench, same_bits, scale):
    """A NaN, or a product of gate and up that overflows, is met by the quantizer in the middle of an expert."""
    D, fmt = 64, WeightFormat.Q8
    parts = [bench.packed(kernels, bench.floats(*s), fmt, 32) for s in ((32, D), (32, D), (D, 32))]
    chunk, listed = bench.of(np.concatenate(parts)), ChunkList(1)
    listed.set(np.array([address_of(chunk)], np.uint64), alike(fmt), np.array([0]), np.array([T]))
    operand = bench.operand(kernels, bench.floats(T, D), quantized=True)
    token_N, weight_N = bench.of(np.arange(T, dtype=np.int32)), bench.of(np.ones(T, np.float32))
    sums_TD, fault_T = bench.empty((2, T, D), np.int64), bench.faults(T)
    arguments = (listed, 1, token_N, weight_N, operand, T, 32, LAYER)
    kernels.experts(sums_TD[0], fault_T, *arguments)
    assert (fault_T == NO_FAULT).all()
    operand.scale_TG[BAD] = scale
    kernels.experts(sums_TD[1], fault_T, *arguments)
    assert only_token_1(fault_T, FaultKind.QUANTIZER)
    same_bits(sums_TD[1][OTHERS], sums_TD[0][OTHERS])


@pytest.mark.parametrize("limit", [2**51, -(2**51), 2**62, -(2**63)])
def test_sums(kernels, bench, same_bits, limit):
    x_TD, sums_TD, fault_T = bench.floats(T, 5), bench.of(np.full((T, 5), 2**51 - 1)), bench.faults(T)
    sums_TD[2] = -(2**51 - 1)
    expected_TD = x_TD.copy()
    kernels.add_exact(expected_TD, fault_T, sums_TD, None, LAYER)
    assert (fault_T == NO_FAULT).all()
    sums_TD[BAD, 4] = limit
    kernels.add_exact(x_TD, fault_T, sums_TD, None, LAYER)
    assert only_token_1(fault_T, FaultKind.SUM)
    same_bits(x_TD[OTHERS], expected_TD[OTHERS])


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("everywhere", [False, True])
def test_router(kernels, bench, same_bits, value, everywhere):
    E, K = 17, 4
    logits_TE = bench.floats(T, E)
    ids, weights = bench.empty((2, T, K), np.int32), bench.empty((2, T, K), np.float32)
    fault_T = bench.faults(T)
    kernels.route(ids[0], weights[0], fault_T, logits_TE, True, LAYER)
    assert (fault_T == NO_FAULT).all()
    logits_TE[BAD, slice(None) if everywhere else 16] = value
    kernels.route(ids[1], weights[1], fault_T, logits_TE, True, LAYER)
    assert only_token_1(fault_T, FaultKind.ROUTER)
    same_bits((ids[1][OTHERS], weights[1][OTHERS]), (ids[0][OTHERS], weights[0][OTHERS]))
    assert len(set(ids[1][BAD].tolist())) == K, "indices must be usable: the step runs to its end"
    assert ((ids[1] >= 0) & (ids[1] < E)).all()


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("column", [0, 128, 199])
def test_logits(kernels, bench, same_bits, value, column):
    V, valid = 300, 200
    logits_TV, ones_T = bench.floats(T, V), bench.of(np.ones(T, np.float32))
    largest, total = bench.empty((2, T, 3), np.float32), bench.empty((2, T, 3), np.float32)
    fault_T = bench.faults(T)
    logits_TV[:, valid] = value  # masked: beyond the tokenizer
    kernels.vocabulary_blocks(largest[0], total[0], fault_T, logits_TV, ones_T, valid, LAYER)
    assert (fault_T == NO_FAULT).all()
    logits_TV[BAD, column] = value
    kernels.vocabulary_blocks(largest[1], total[1], fault_T, logits_TV, ones_T, valid, LAYER)
    assert only_token_1(fault_T, FaultKind.LOGIT)
    same_bits((largest[1][OTHERS], total[1][OTHERS]), (largest[0][OTHERS], total[0][OTHERS]))
    ids_TN, best_TN = bench.empty((T, 5), np.int32), bench.empty((T, 5), np.float32)
    kernels.top_logits(ids_TN, best_TN, logits_TV, largest[1], np.arange(3, dtype=np.int32), valid)
    assert ((ids_TN >= -1) & (ids_TN < valid)).all()
