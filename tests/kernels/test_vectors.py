"""Embedding, RMSNorm, the activation quantizer, the addition of exact sums.

T tokens, D model dim, V vocabulary, C columns.
"""

import numpy as np
import pytest

from dist_moe.kernels import NO_FAULT, Operand, reference

SIZES = [(1, 1), (3, 16), (1, 31), (5, 33), (17, 48), (3, 64), (2, 128), (4, 130), (2, 2048), (40, 1024)]
U = 2.0**-24  # half an ulp of f32 at 1


def rmsnorm(kernels, bench, x_TD, gain_D, eps):
    out_TD = bench.empty(x_TD.shape, np.float32)
    kernels.rmsnorm(out_TD, x_TD, gain_D, eps)
    return out_TD


@pytest.mark.parametrize("bf16", [False, True])
def test_embedding_copies_rows(kernels, bench, same_bits, bf16):
    table_VD, ids_T = bench.wild(7, 33), bench.of(bench.rng.integers(0, 7, 1001, np.int32))
    stored = bench.of(reference.f32_to_bf16(table_VD)) if bf16 else table_VD
    x_TD = bench.empty((1001, 33), np.float32)
    kernels.embed(x_TD, stored, ids_T)
    same_bits(x_TD, (reference.bf16_to_f32(stored) if bf16 else table_VD)[ids_T])


def test_embedding_refuses_ids_beyond_the_table(portable, bench):
    table_VD, x_TD = bench.floats(7, 4), bench.empty((1, 4), np.float32)
    for wrong in (7, -1):
        with pytest.raises(TypeError, match="token ids"):
            portable.embed(x_TD, table_VD, np.array([wrong], np.int32))


@pytest.mark.parametrize(("T", "D"), SIZES)
def test_rmsnorm_values(portable, bench, T, D):
    x_TD, gain_D, eps = bench.floats(T, D, scale=3.0), bench.floats(D), np.float32(1e-6)
    found_TD = rmsnorm(portable, bench, x_TD, gain_D, eps)
    expected_TD = reference.rmsnorm(x_TD, gain_D, float(eps))
    # A lane adds ceil(D / 16) squares, the tree 4 times; the root halves it; six single operations follow.
    bound = ((-(-D // 16) + 4) / 2 + 6) * U
    assert (np.abs(found_TD - expected_TD) <= bound * np.abs(expected_TD)).all()


def test_rmsnorm_of_zeros_and_of_large_values(portable, bench):
    x_TD = bench.of(np.array([[0.0] * 40, [1e18] * 40, [1e-20] * 40], np.float32))
    found_TD = rmsnorm(portable, bench, x_TD, bench.of(np.ones(40, np.float32)), 1e-6)
    assert (found_TD[0] == 0).all()
    np.testing.assert_allclose(found_TD[1], 1.0, rtol=10 * U)
    np.testing.assert_allclose(found_TD[2], 1e-17, rtol=10 * U)


@pytest.mark.parametrize(("T", "D"), SIZES)
def test_rmsnorm_bits(portable, kernels, bench, same_bits, T, D):
    x_TD, gain_D = bench.floats(T, D), bench.wild(D)
    x_TD[0] *= np.float32(1e-22)  # squares become denormal
    together_TD = rmsnorm(kernels, bench, x_TD, gain_D, 1e-6)
    same_bits(together_TD, rmsnorm(portable, bench, x_TD, gain_D, 1e-6))
    for t in {0, T // 2, T - 1}:
        same_bits(rmsnorm(kernels, bench, bench.of(x_TD[t : t + 1]), gain_D, 1e-6)[0], together_TD[t])
    kernels.rmsnorm(x_TD, x_TD, gain_D, 1e-6)  # in place
    same_bits(x_TD, together_TD)


@pytest.mark.parametrize(("T", "C"), SIZES)
def test_quantizer_is_exactly_rule_5(kernels, bench, same_bits, T, C):
    for x_TC in (bench.floats(T, C), bench.wild(T, C)):
        operand = bench.operand(kernels, x_TC, quantized=True)
        same_bits((operand.q_TC, operand.scale_TG, operand.sum_TG), reference.quantize(x_TC))


def test_quantizer_edges(kernels, bench):
    below, at = np.nextafter(np.float32(2.0**-64), np.float32(0)), np.float32(2.0**-64)
    x_TC = np.zeros((5, 32), np.float32)
    x_TC[0, 5], x_TC[1, 5], x_TC[2, :4], x_TC[3, 0] = below, at, [127, 0.5, 1.5, -2.5], np.finfo(np.float32).max
    operand = bench.operand(kernels, x_TC, quantized=True)
    assert operand.scale_TG[:, 0].tolist() == [0, at / np.float32(127), 1, x_TC[3, 0] / np.float32(127), 0]
    assert operand.q_TC[2, :4].tolist() == [127, 0, 2, -2]  # ties to even
    assert (operand.q_TC[1, 5], operand.q_TC[3, 0]) == (127, 127)
    assert not operand.q_TC[0].any()
    assert operand.sum_TG[2, 0] == 127


def test_quantizer_error_is_half_a_step(portable, bench):
    x_TC = bench.floats(4, 130)
    operand = bench.operand(portable, x_TC, quantized=True)
    values_TC = reference.dequantize(operand.q_TC, operand.scale_TG, 130)
    step_TC = np.repeat(operand.scale_TG.astype(np.float64), 32, axis=1)[:, :130]
    # x * inv and the two divisions are off by 3 * 2^-24 of at most 127 steps.
    assert (np.abs(values_TC - x_TC) <= step_TC * (0.5 + 127 * 4 * U)).all()


def test_only_the_steps_tokens_are_quantized(kernels, bench):
    operand = Operand(3, 40, True)
    operand.x_TC[...] = 1
    operand.q_TC.fill(77)
    kernels.quantize(operand, bench.faults(2), 2, 0)
    assert (operand.q_TC[:2, :40] == 127).all()
    assert not operand.q_TC[:2, 40:].any()
    assert (operand.q_TC[2] == 77).all()
    plain = Operand(3, 40, False)
    kernels.quantize(plain, bench.faults(2), 2, 0)  # nothing to do


@pytest.mark.parametrize(("T", "D"), SIZES)
def test_exact_sums_are_added(kernels, bench, same_bits, T, D):
    x_TD, fault_T = bench.floats(T, D), bench.faults(T)
    sums_TD = bench.of(bench.rng.integers(-(2**50), 2**50, (T, D)) >> bench.rng.integers(0, 50, (T, D)))
    expected_TD = x_TD + reference.from_fixed_point(sums_TD)
    kernels.add_exact(x_TD, fault_T, sums_TD, None, 1)
    same_bits(x_TD, expected_TD)
    assert (fault_T == NO_FAULT).all()


@pytest.mark.parametrize(("T", "D"), SIZES)
def test_exact_sums_with_bias(portable, kernels, bench, same_bits, T, D):
    x_TD, bias_D = bench.floats(T, D), bench.floats(D)
    sums_TD = bench.of(bench.rng.integers(-(2**34), 2**34, (T, D)))
    expected_TD = x_TD.astype(np.float64) + bias_D + sums_TD * 2.0**-32
    rows = []
    for each in (portable, kernels):
        out_TD = bench.of(x_TD)
        each.add_exact(out_TD, bench.faults(T), sums_TD, bias_D, 1)
        # Three roundings: of the sum to f32, of the bias's addition, of the residual's.
        bound_TD = (np.abs(sums_TD * 2.0**-32) + np.abs(bias_D)) * 2 * U + np.abs(expected_TD) * U
        assert (np.abs(out_TD - expected_TD) <= bound_TD * 1.001).all()
        rows.append(out_TD)
    same_bits(rows[1], rows[0])
