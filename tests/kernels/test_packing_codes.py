"""Weights that come as integers and scales: packed as the kernels pack them, and exact in every code."""

import numpy as np
import pytest

from dist_moe.kernels import MatrixFormat, MatrixList, WeightFormat, packed_bytes, reference
from dist_moe.kernels.packing import pack_codes


def codes_of(q_RC: np.ndarray, fmt: WeightFormat) -> np.ndarray:
    groups = q_RC.reshape(len(q_RC), -1, 32)
    if fmt == WeightFormat.Q8:
        return (groups + 128).astype(np.uint8)
    return ((groups[..., :16] + 8) | (groups[..., 16:] + 8) << 4).astype(np.uint8)


@pytest.mark.parametrize("fmt", [WeightFormat.Q4, WeightFormat.Q8])
@pytest.mark.parametrize(("R", "C"), [(16, 32), (1, 32), (33, 96), (128, 160)])
def test_the_bytes_are_those_of_the_kernel(portable, bench, fmt, R, C):
    weights_RC = bench.floats(R, C)
    packed = bench.packed(portable, weights_RC, fmt, 32)
    scale_RG = reference.weight_scales(weights_RC, fmt, 32)
    q_RC, _ = reference.quantize_weights(weights_RC, scale_RG, fmt, 32)
    found = bench.empty(len(packed), np.uint8)
    assert pack_codes(found, scale_RG, codes_of(q_RC, fmt), fmt) == 0
    assert np.array_equal(found, packed)


def test_missing_rows_are_zeros_and_infinite_scales_are_counted(bench):
    scale_RG = np.array([[1.0, np.inf], [np.nan, 2.0]], np.float16)
    packed = bench.empty(packed_bytes(WeightFormat.Q4, 32, 64, 32), np.uint8)
    assert pack_codes(packed, scale_RG, np.full((2, 2, 16), 0xF9, np.uint8), WeightFormat.Q4) == 64
    expected = np.zeros((32, 64))
    expected[0, :16], expected[0, 16:32] = 1, 7
    expected[1, 32:48], expected[1, 48:] = 2, 14
    assert np.array_equal(reference.unpack_matrix(packed, 32, 64, WeightFormat.Q4, 32), expected)


@pytest.mark.parametrize("T", [1, 3, 4, 16, 33])
def test_the_code_that_our_quantizer_leaves_out_is_exact(portable, kernels, bench, T):
    """-128 comes with Q8_0 files: against activations of +-127, sums of 16 bits would overflow."""
    q_RC = np.full((32, 64), -128)
    q_RC[1] = 127
    q_RC[2, ::2] = 127
    packed = bench.empty(packed_bytes(WeightFormat.Q8, 32, 64, 32), np.uint8)
    pack_codes(packed, np.ones((32, 2), np.float16), codes_of(q_RC, WeightFormat.Q8), WeightFormat.Q8)
    x_TC = np.where(np.arange(T)[:, None] % 2, 127.0, -127.0) * np.ones((1, 64))
    operand = bench.operand(kernels, bench.of(x_TC.astype(np.float32)), True)
    out_TR = bench.empty((T, 32), np.float32)
    kernels.matmul(out_TR, MatrixList([(packed, 32, 0, MatrixFormat(WeightFormat.Q8, 32))]), operand, T)
    assert np.array_equal(out_TR, x_TC @ q_RC.T)
