"""Packed weights: sizes, exact inverse, quantizer, padding, whole rows' scales of slices.

R matrix rows, C matrix columns.
"""

import numpy as np
import pytest

from dist_moe.errors import UsageError
from dist_moe.kernels import (
    ChunkFormat,
    KvFormat,
    MatrixFormat,
    WeightFormat,
    chunk_bytes,
    kv_block_bytes,
    packed_bytes,
    reference,
)
from dist_moe.kernels._native import ffi, lib

QUANTIZED = [WeightFormat.Q8, WeightFormat.Q4]
SIZES = [(1, 1), (1, 33), (16, 32), (17, 31), (33, 64), (48, 128), (31, 130), (130, 48)]
GROUPS = [32, 64, 128, 0]


def unpack(kernels, bench, packed, shape, fmt, group):
    weights = bench.empty(shape, np.float32)
    kernels.unpack(weights, packed, fmt, group)
    return weights


@pytest.mark.parametrize("fmt", list(WeightFormat))
def test_sizes_are_those_of_the_header(fmt):
    for group in GROUPS:
        for rows in (1, 15, 16, 17, 130):
            for columns in (1, 2, 31, 32, 33, 128, 2048, 2049):
                assert packed_bytes(fmt, rows, columns, group) == lib.dm_packed_bytes(fmt, rows, columns, group)
                assert packed_bytes(fmt, rows, columns, group) % 64 == 0
        for down, down_group in ((fmt, group), (WeightFormat.Q8, 64), (WeightFormat.BF16, 0)):
            struct = ffi.new("dm_chunk_format *", (fmt, down, group, down_group, 1))
            chunk = ChunkFormat(MatrixFormat(fmt, group), MatrixFormat(down, down_group))
            assert chunk_bytes(chunk, 2048, 96) == lib.dm_chunk_bytes(struct, 2048, 96)
    # DESIGN section 4: 4 bits per weight and one f16 per 32 of them.
    assert packed_bytes(WeightFormat.Q4, 768, 2048, 32) == 768 * 2048 // 2 + 768 * 64 * 2


@pytest.mark.parametrize("fmt", list(KvFormat))
def test_kv_block_sizes_are_those_of_the_header(fmt):
    for head_dim in (1, 2, 30, 32, 48, 128, 130):
        assert kv_block_bytes(fmt, head_dim) == lib.dm_kv_block_bytes(fmt, head_dim)
        assert kv_block_bytes(fmt, head_dim) % 64 == 0


def test_formats_are_parsed_by_their_labels():
    assert [WeightFormat.parse(label) for label in ("f32", "bf16", "q8", "q4")] == list(WeightFormat)
    assert [KvFormat.parse(fmt.label) for fmt in KvFormat] == list(KvFormat)
    with pytest.raises(UsageError, match=r"q5.*f32, bf16, q8, q4"):
        WeightFormat.parse("q5")
    with pytest.raises(UsageError, match=r"F16.*f32, f16, q8"):
        KvFormat.parse("F16")


@pytest.mark.parametrize("shape", SIZES)
def test_f32_and_bf16_keep_every_bit(portable, bench, same_bits, shape):
    weights = bench.wild(*shape)
    weights.view(np.uint32)[:, ::2] &= 0xFFFF8000  # ties between two bf16
    packed = bench.packed(portable, weights, WeightFormat.F32, 32)
    same_bits(unpack(portable, bench, packed, shape, WeightFormat.F32, 32), weights)
    assert np.array_equal(reference.unpack_matrix(packed, *shape, WeightFormat.F32, 32), weights)
    rounded = reference.bf16_to_f32(reference.f32_to_bf16(weights))
    packed = bench.packed(portable, weights, WeightFormat.BF16, 32)
    same_bits(unpack(portable, bench, packed, shape, WeightFormat.BF16, 32), rounded)
    assert np.array_equal(reference.unpack_matrix(packed, *shape, WeightFormat.BF16, 32), rounded)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("ties", [False, True])
def test_quantized_values_are_the_definition(portable, bench, ties, fmt, group, shape):
    weights = bench.floats(*shape, scale=0.02)
    if ties:  # q4: the first of the largest magnitudes decides the scale's sign
        weights[...] = np.rint(weights * 50) / 16
    packed = bench.packed(portable, weights, fmt, group)
    scales = reference.weight_scales(weights, fmt, group)
    _, expected = reference.quantize_weights(weights, scales, fmt, group)
    assert np.array_equal(unpack(portable, bench, packed, shape, fmt, group), expected)
    assert np.array_equal(reference.unpack_matrix(packed, *shape, fmt, group), expected)
    # Half a step, plus what the f16 scale (2^-11) lets the ends of the range be off; q4's far end clips at 7 steps.
    step = np.abs(np.repeat(scales.astype(np.float64), group or shape[1], axis=1)[:, : shape[1]])
    levels = 127 if fmt == WeightFormat.Q8 else 8
    bound = step * (0.5 + levels * 2.0**-10)
    if fmt == WeightFormat.Q4:
        bound = np.where(np.abs(weights) > 7.5 * step, step * (1 + levels * 2.0**-10), bound)
    assert (np.abs(expected - weights) <= bound).all()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_representable_values_are_lossless(portable, bench, fmt, group):
    shape, low, high = (33, 160), *((-127, 128) if fmt == WeightFormat.Q8 else (-8, 8))
    codes = bench.rng.integers(low, high, shape)
    codes[:, ::32] = -127 if fmt == WeightFormat.Q8 else -8  # every group reaches its largest magnitude
    codes[3] = 0
    weights = bench.of((codes * 2.0 ** bench.rng.integers(-8, 3, (33, 1))).astype(np.float32))
    packed = bench.packed(portable, weights, fmt, group)
    assert np.array_equal(unpack(portable, bench, packed, shape, fmt, group), weights)


@pytest.mark.parametrize("fmt", list(WeightFormat))
def test_padding_multiplies_to_nothing(portable, bench, fmt):
    rows, columns, offset = 17, 33, {WeightFormat.Q8: 128, WeightFormat.Q4: 0x88}.get(fmt, 0)
    packed = bench.packed(portable, bench.floats(rows, columns), fmt, 32)
    padded = reference.unpack_matrix(packed, 32, columns, fmt, 32)
    assert not padded[rows:].any()
    if fmt.quantized:
        padded = reference.unpack_matrix(packed, 32, 64, fmt, 32)
        assert not padded[:, columns:].any()
        # The last tile's second row is padding: its bytes hold the code of zero, its scales are zero bits.
        tile = packed.reshape(2, -1)[1]
        assert (tile[64 + 4 : 64 + 8] == offset).all()
        assert not tile[2:32].any()


def test_padding_bytes_are_written(portable, bench):
    packed = bench.packed(portable, bench.floats(16, 1), WeightFormat.BF16, 0)
    assert not packed[32:].any()
    packed = bench.packed(portable, bench.floats(16, 32), WeightFormat.Q4, 32)
    assert not packed[32:64].any()


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_slices_of_rows_keep_whole_rows_scales(portable, bench, fmt):
    whole = bench.floats(20, 192)
    scale = bench.empty(20, np.float32)
    portable.row_scales(scale, whole, fmt)
    assert np.array_equal(scale, reference.weight_scales(whole, fmt, 0)[:, 0].astype(np.float32))
    expected = unpack(portable, bench, bench.packed(portable, whole, fmt, 0), whole.shape, fmt, 0)
    for columns in (slice(0, 64), slice(64, 192)):
        part = whole[:, columns]  # rows lie apart
        packed = bench.packed(portable, part, fmt, 0, scale)
        assert np.array_equal(unpack(portable, bench, packed, part.shape, fmt, 0), expected[:, columns])
    rows = bench.packed(portable, whole[3:9], fmt, 0, bench.of(scale[3:9]))
    assert np.array_equal(unpack(portable, bench, rows, (6, 192), fmt, 0), expected[3:9])


@pytest.mark.parametrize("fmt", list(WeightFormat))
def test_bad_weights_are_counted(portable, bench, fmt):
    weights = bench.floats(17, 64)
    weights[0, 3], weights[16, 63], weights[5, 40] = np.nan, np.inf, -np.inf
    packed = bench.empty(packed_bytes(fmt, 17, 64, 32), np.uint8)
    assert portable.pack(packed, weights, None, fmt, 32) >= 3
    weights = bench.floats(17, 64)
    weights[2, 2] = 65520 * 127  # the q8 scale rounds to infinity in f16, the q4 scale too
    assert portable.pack(packed, weights, None, fmt, 32) == (1 if fmt.quantized else 0)


@pytest.mark.parametrize("fmt", list(WeightFormat))
def test_same_bits_everywhere(portable, kernels, bench, same_bits, fmt):
    for shape in [(1, 1), (33, 130), (130, 97), (300, 256)]:
        weights = bench.wild(*shape) if not fmt.quantized else bench.floats(*shape, scale=1e-5)
        for group in GROUPS:
            packed = bench.packed(portable, weights, fmt, group)
            same_bits(bench.packed(kernels, weights, fmt, group), packed)
            same_bits(
                unpack(kernels, bench, packed, shape, fmt, group), unpack(portable, bench, packed, shape, fmt, group)
            )
