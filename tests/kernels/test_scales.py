"""The choice of scales, and lists of matrices that are packed at once.

R matrix rows, C matrix columns.
"""

import numpy as np
import pytest

from dist_moe.kernels import Kernels, PackMatrix, ScaleChoice, WeightFormat, packed_bytes, reference
from dist_moe.kernels.reference_scales import least_error_scales

QUANTIZED = [WeightFormat.Q8, WeightFormat.Q4]
GROUPS = [32, 64, 128, 0]
SHAPE = (33, 320)


def pack(kernels, bench, weights, fmt, group, scales, importance=None):
    packed = bench.empty(packed_bytes(fmt, *weights.shape, group), np.uint8)
    matrix = PackMatrix(packed, weights, *weights.shape, group, None, importance)
    assert kernels.pack_matrices([matrix], fmt, scales) == [0]
    return packed


def scales_of(packed, fmt, group):
    """The f16 scales [R, groups] of a matrix of SHAPE."""
    rows, columns = SHAPE
    tiles, groups = -(-rows // 16), -(-columns // group) if group else 1
    scales = packed.reshape(tiles, -1)[:, : groups * 32].copy().view(np.float16)
    return scales.reshape(tiles, groups, 16).swapaxes(1, 2).reshape(-1, groups)[:rows].copy()


def errors(weights, packed, fmt, group, importance=None):
    """The summed squared error of every group of every row, float64."""
    off = reference.unpack_matrix(packed, *weights.shape, fmt, group) - weights
    off = off**2 if importance is None else off**2 * importance
    return np.add.reduceat(off, np.arange(0, weights.shape[1], group or weights.shape[1]), axis=1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_mse_is_never_worse_in_any_group(portable, bench, fmt, group, weighted):
    weights = bench.floats(*SHAPE, scale=0.02)
    weights[3, :40] = 0
    importance = bench.of(np.abs(bench.floats(1, SHAPE[1])[0]) + np.float32(0.1)) if weighted else None
    absmax = errors(weights, pack(portable, bench, weights, fmt, group, ScaleChoice.ABSMAX), fmt, group, importance)
    packed = pack(portable, bench, weights, fmt, group, ScaleChoice.MSE, importance)
    mse = errors(weights, packed, fmt, group, importance)
    assert (mse <= absmax * (1 + 1e-5)).all()  # the kernels compare sums of float32
    assert mse.sum() < absmax.sum() * (0.9 if fmt == WeightFormat.Q4 else 1)


@pytest.mark.parametrize("scale", [0.02, 1e-6, 3e5])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_mse_is_its_definition_to_the_bit(portable, bench, fmt, group, weighted, scale):
    """Also of ties, zeros, scales that are denormal or overflow in the search, and columns of no importance."""
    weights = bench.floats(*SHAPE, scale=scale)
    weights[3, :40] = 0
    weights[5] = np.rint(weights[5] / scale) * scale
    if scale > 1:
        np.clip(weights, -65504 * 7.9, 65504 * 7.9, out=weights)
    importance = bench.of(np.abs(bench.floats(1, SHAPE[1])[0])) if weighted else None
    if importance is not None:
        importance[64:128] = 0
    scale_RG = least_error_scales(weights, fmt, group, importance)
    packed = pack(portable, bench, weights, fmt, group, ScaleChoice.MSE, importance)
    assert np.array_equal(scales_of(packed, fmt, group).view(np.uint16), scale_RG.view(np.uint16))
    _, values = reference.quantize_weights(weights, scale_RG, fmt, group)
    assert np.array_equal(reference.unpack_matrix(packed, *SHAPE, fmt, group), values)


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_mse_keeps_what_is_exact(portable, bench, fmt):
    codes = bench.rng.integers(-7, 7, (16, 64))
    codes[:, ::32] = -127 if fmt == WeightFormat.Q8 else -8
    weights = bench.of((codes * 2.0**-6).astype(np.float32))
    packed = pack(portable, bench, weights, fmt, 32, ScaleChoice.MSE)
    assert np.array_equal(reference.unpack_matrix(packed, 16, 64, fmt, 32), weights)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scales", list(ScaleChoice))
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_same_bits_everywhere(portable, kernels, bench, same_bits, fmt, scales, threads):
    importance = bench.of(np.abs(bench.floats(1, SHAPE[1])[0]))
    with Kernels(threads, kernels.isa) as others:
        for weights in (bench.floats(*SHAPE, scale=0.02), bench.floats(*SHAPE, scale=1e-5)):
            for group in GROUPS:
                expected = pack(portable, bench, weights, fmt, group, scales, importance)
                same_bits(pack(others, bench, weights, fmt, group, scales, importance), expected)


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_slices_of_rows_keep_whole_rows_scales(portable, bench, fmt):
    whole = bench.floats(20, 192)
    scale = bench.empty(20, np.float32)
    portable.row_scales(scale, whole, fmt, ScaleChoice.MSE)
    expected = reference.unpack_matrix(pack(portable, bench, whole, fmt, 0, ScaleChoice.MSE), 20, 192, fmt, 0)
    part = whole[:, 64:]
    packed = bench.empty(packed_bytes(fmt, *part.shape, 0), np.uint8)
    portable.pack_matrices([PackMatrix(packed, part, *part.shape, 0, scale)], fmt, ScaleChoice.MSE)
    assert np.array_equal(reference.unpack_matrix(packed, *part.shape, fmt, 0), expected[:, 64:])


@pytest.mark.parametrize("scales", list(ScaleChoice))
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_scales_of_whole_rows_leave_out_what_is_not_finite(kernels, bench, scales, fmt):
    whole = bench.floats(20, 96)
    whole[1, 5], whole[17, 40] = np.nan, -np.inf
    scale = bench.empty((2, 20), np.float32)
    kernels.row_scales(scale[0], whole, fmt, scales)
    kernels.row_scales(scale[1], bench.of(np.where(np.isfinite(whole), whole, 0)), fmt, scales)
    assert np.isfinite(scale[0]).all()
    assert np.array_equal(scale[0], scale[1])


@pytest.mark.parametrize("fmt", list(WeightFormat))
def test_a_list_is_its_matrices_one_by_one(kernels, bench, same_bits, fmt):
    """Slices of bf16 and f32, filled up with rows and columns of zeros; bad weights are counted for their matrix."""
    bits = (bench.floats(70, 100).view(np.uint32) >> 16).astype(np.uint16)
    shapes = [((70, 100), (70, 100)), ((17, 40), (32, 40)), ((5, 33), (48, 64)), ((33, 50), (40, 50))]
    matrices, expected, counts = [], [], []
    for number, (given, shape) in enumerate(shapes):
        for stored in (bits, (bits.astype(np.uint32) << 16).view(np.float32)):
            source = stored[: given[0], : given[1]].copy() if number % 2 else stored[: given[0], : given[1]]
            values = (source.astype(np.uint32) << 16).view(np.float32) if source.dtype == np.uint16 else source
            padded = bench.of(np.zeros(shape, np.float32))
            padded[: given[0], : given[1]] = values
            expected.append(bench.packed(kernels, padded, fmt, 32))
            packed = bench.empty(packed_bytes(fmt, *shape, 32), np.uint8)
            matrices.append(PackMatrix(packed, source, *shape, 32))
            counts.append(0)
    assert kernels.pack_matrices(matrices, fmt) == counts
    for matrix, same in zip(matrices, expected, strict=True):
        same_bits(matrix.packed, same)
    broken = matrices[2].weights_RC.copy()
    broken[3, 7] = 0x7FC0  # NaN
    matrices[2] = PackMatrix(matrices[2].packed, broken, 32, 40, 32)
    assert kernels.pack_matrices(matrices, fmt) == [0, 0, 1, *counts[3:]]


def test_matrices_that_do_not_fit_are_refused(portable, bench):
    packed = bench.empty(packed_bytes(WeightFormat.Q4, 16, 32, 32), np.uint8)
    for weights in (np.zeros((17, 32), np.float32), np.zeros((16, 32)), np.zeros((16, 64), np.float32)[:, ::2]):
        with pytest.raises(TypeError):
            portable.pack_matrices([PackMatrix(packed, weights, 16, 32, 32)], WeightFormat.Q4)
