"""Sums as bytes for the network: packed without loss, finished as f32, rounded; and bytes that are damaged."""

from __future__ import annotations

import numpy as np
import pytest

from dist_moe.kernels import NO_FAULT, FaultKind, Kernels
from dist_moe.kernels import reference_sums as reference
from dist_moe.kernels.sums_wire import (
    WireFormat,
    decode_sums,
    encode_sums,
    pack_sums,
    packed_bound,
    unpack_sums,
    wire_bound,
)

SIZES = (0, 1, 2, 31, 32, 33, 63, 64, 65, 100, 2048, 2049)
EXTREMES = [0, 1, -1, 127, 128, -128, -129, 2**31 - 1, -(2**31), 2**39, -(2**39) - 1, 2**63 - 1, -(2**63)]
LIMIT = 1 << 51
AT_THE_LIMIT = [LIMIT - 1, LIMIT, LIMIT + 1, LIMIT - (1 << 27), 1 - LIMIT, -LIMIT, -LIMIT - 1, 2**63 - 1, -(2**63)]


def of_bits(rng: np.random.Generator, count: int, bits: int) -> np.ndarray:
    """Random values of at most so many bits and a sign; 0 bits: all 0."""
    return rng.integers(-(1 << bits), 1 << bits, count, np.int64) if bits else np.zeros(count, np.int64)


def there(bench, values: np.ndarray) -> np.ndarray:
    """Packed in guarded memory; only the bytes that are used."""
    packed = bench.empty(packed_bound(len(values)), np.uint8)
    return bench.of(packed[: pack_sums(packed, values)])


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("bits", [0, 1, 7, 8, 15, 23, 31, 32, 39, 47, 55, 62])
def test_packing_is_lossless_at_every_width(bench, count: int, bits: int) -> None:
    values = bench.of(of_bits(bench.rng, count, bits))
    packed = there(bench, values)
    assert packed.tobytes() == reference.pack_sums(values)
    again = bench.empty(count, np.int64)
    assert unpack_sums(again, packed) == len(packed)
    assert (again == values).all()


def test_packing_holds_the_extremes_and_mixed_widths(bench) -> None:
    rng = bench.rng
    for _ in range(200):
        bits = rng.integers(0, 63, -(-int(rng.integers(1, 300)) // 32))
        values = np.concatenate([of_bits(rng, 32, int(b)) for b in bits])[: int(rng.integers(1, 32 * len(bits) + 1))]
        values[rng.integers(0, len(values))] = rng.choice(EXTREMES)
        packed = there(bench, values)
        assert packed.tobytes() == reference.pack_sums(values)
        again = np.empty_like(values)
        assert unpack_sums(again, packed) == len(packed)
        assert (again == values).all()


@pytest.mark.parametrize("count", [1, 33, 2048])
def test_unpacking_can_add(bench, count: int) -> None:
    values, sums = of_bits(bench.rng, count, 40), bench.of(of_bits(bench.rng, count, 62))
    expected = sums + values
    assert unpack_sums(sums, there(bench, values), add=True)
    assert (sums == expected).all()


def test_a_sum_beyond_64_bits_wraps(bench) -> None:
    sums = bench.of(np.array([2**63 - 1, -(2**63)], np.int64))
    assert unpack_sums(sums, there(bench, np.array([1, -1], np.int64)), add=True)
    assert sums.tolist() == [-(2**63), 2**63 - 1]


def test_packing_takes_the_fewest_bytes(bench) -> None:
    assert packed_bound(64) == 2 * (1 + 32 * 8)
    assert len(there(bench, np.zeros(64, np.int64))) == 2
    assert len(there(bench, np.full(64, -1, np.int64))) == 2 * (1 + 32)


def test_damaged_bytes_are_refused_and_nothing_else_is_touched(bench) -> None:
    values = of_bits(bench.rng, 100, 33)
    packed = there(bench, values)
    sums = bench.empty(100, np.int64)
    assert not unpack_sums(sums, packed[:0])
    for length in range(len(packed)):
        assert not unpack_sums(sums, bench.of(packed[:length])), length
    for width in (9, 64, 255):
        damaged = bench.of(packed)
        damaged[0] = width
        assert not unpack_sums(sums, damaged)
    for _ in range(2000):  # whatever the bytes are, the guards stay
        noise = bench.rng.integers(0, 10, int(bench.rng.integers(0, 900)), np.uint8)
        assert 0 <= unpack_sums(sums, noise, add=bool(bench.rng.integers(2))) <= len(noise)


@pytest.mark.parametrize("wire", WireFormat)
@pytest.mark.parametrize("count", SIZES)
def test_every_form_keeps_to_its_bound(bench, wire: WireFormat, count: int) -> None:
    values = bench.of(of_bits(bench.rng, count, 35))
    encoded = bench.empty(wire_bound(count, wire), np.uint8)
    used = encode_sums(encoded, values, wire)
    assert used <= len(encoded)
    sums = bench.empty(count, np.int64)
    assert decode_sums(sums, bench.of(encoded[:used]), wire) == used
    added = bench.of(values)
    assert decode_sums(added, encoded[:used], wire, add=True) == used
    assert (added == values + sums).all()
    assert count == 0 or not decode_sums(sums, bench.of(encoded[: used - 1]), wire)
    with pytest.raises(TypeError):
        encode_sums(encoded[: wire_bound(count, wire) - 1 if count else 0], np.zeros(count + 1, np.int64), wire)


def through(values: np.ndarray, wire: WireFormat) -> np.ndarray:
    """What the other side has."""
    encoded, sums = np.empty(wire_bound(len(values), wire), np.uint8), np.empty_like(values)
    encode_sums(encoded, values, wire)
    decode_sums(sums, encoded, wire)
    return sums


def used(kernels: Kernels, sums: np.ndarray) -> tuple[np.ndarray, int]:
    """What the residual gets from one token's sums, and its fault."""
    x_TD, fault_T = np.zeros((1, len(sums)), np.float32), np.full(1, NO_FAULT, np.int32)
    kernels.add_exact(x_TD, fault_T, sums.reshape(1, -1), None, 0)
    return x_TD[0], int(fault_T[0])


@pytest.mark.parametrize("bits", [3, 20, 24, 25, 33, 45, 51])
def test_a_finished_sum_is_used_as_the_same_number(bench, kernels: Kernels, bits: int, same_bits) -> None:
    values = np.clip(of_bits(bench.rng, 1000, bits), 1 - LIMIT, LIMIT - 1)
    again = through(values, WireFormat.F32)
    (x, fault), (expected, expected_fault) = used(kernels, again), used(kernels, values)
    same_bits(x, expected)
    same_bits(x, reference.finished_sums(values))
    assert fault == expected_fault == NO_FAULT
    assert (through(again, WireFormat.F32) == again).all()


@pytest.mark.parametrize("value", AT_THE_LIMIT)
def test_a_finished_sum_keeps_its_range_fault(kernels: Kernels, value: int, same_bits) -> None:
    values = np.array([5, value, -7], np.int64)
    again = through(values, WireFormat.F32)
    (x, fault), (expected, expected_fault) = used(kernels, again), used(kernels, values)
    same_bits(x, expected)
    assert fault == expected_fault
    assert fault == (FaultKind.SUM if reference.is_out_of_range(values).any() else NO_FAULT)


@pytest.mark.parametrize("bits", [0, 5, 30, 35, 50])
def test_rounded_forms_are_what_the_reference_says(bench, bits: int) -> None:
    values = of_bits(bench.rng, 1000, bits)
    assert (through(values, WireFormat.BF16) == reference.bf16_sums(values)).all()
    rounded = through(values, WireFormat.Q8)
    assert (rounded == reference.q8_sums(values)).all()
    limit = np.repeat(np.abs(values[:992]).reshape(-1, 32).max(axis=1) / 127, 32)
    assert (np.abs(rounded - values)[:992] <= 0.51 * limit + 1).all()


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 2**53, -(2**53)])
@pytest.mark.parametrize("wire", [WireFormat.BF16, WireFormat.Q8])
def test_a_rounded_sum_out_of_range_stays_out_of_range(wire: WireFormat, value: int) -> None:
    assert reference.is_out_of_range(through(np.array([value, 0], np.int64), wire)).tolist() == [True, False]
