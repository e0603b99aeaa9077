"""The hash by which ranks recognise each other's state, against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from dist_moe.kernels import hash_floats


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
@pytest.mark.parametrize("count", [*range(36), 1000, 4099])
def test_it_is_xxh64_of_the_bytes(count: int, seed: int) -> None:
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    assert hash_floats(values, seed) == xxhash.xxh64_intdigest(values.tobytes(), seed)


def test_rows_of_any_shape_hash_as_one_run() -> None:
    values = np.arange(60, dtype=np.float32)
    assert hash_floats(values.reshape(3, 4, 5)) == hash_floats(values)


def test_the_payload_of_a_nan_does_not_count_but_its_place_does() -> None:
    values = np.ones((4, 20), np.float32)
    hashes = set()
    for bits in (0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF):
        values.view(np.uint32)[3, 7] = bits
        hashes.add(hash_floats(values))
    assert len(hashes) == 1
    values[3, 7], values[3, 8] = 1, np.nan
    assert hash_floats(values) not in hashes


def test_infinities_and_zeros_keep_their_sign() -> None:
    found = {hash_floats(np.full(9, value, np.float32)) for value in (0.0, -0.0, np.inf, -np.inf, np.nan)}
    assert len(found) == 5


def test_every_bit_of_every_float_counts() -> None:
    values = np.linspace(-3, 3, 19, dtype=np.float32)
    found = {hash_floats(values)}
    for i in range(19):
        for bit in range(32):
            other = values.copy()
            other.view(np.uint32)[i] ^= np.uint32(1 << bit)
            found.add(hash_floats(other))
    assert len(found) == 1 + 19 * 32


def test_another_type_and_gaps_are_refused() -> None:
    with pytest.raises(TypeError):
        hash_floats(np.zeros(4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="contiguous"):
        hash_floats(np.zeros((4, 4), np.float32)[:, :2])
