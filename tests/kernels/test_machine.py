"""The loops that the machine is measured with: they read every byte, and run at every level and thread count."""

from __future__ import annotations

import numpy as np
import pytest

from dist_moe.kernels import Kernels, WeightFormat, isa_levels

PIECE_BYTES = 8 << 20


@pytest.mark.parametrize("isa", isa_levels())
@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_is_read(isa: str, threads: int) -> None:
    with Kernels(threads, isa) as kernels:
        for size in (256, 4096, 64 << 10, PIECE_BYTES + 16 * 256):
            data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
            expected = int(np.bitwise_xor.reduce(data.view(np.int32)))
            for streams in (1, 4, 16):
                if size % (256 * streams) == 0:
                    seconds, seen = kernels.read_seconds(data, streams, 512 * (streams > 1))
                    assert seen == expected
                    assert seconds > 0


@pytest.mark.parametrize("size", [1, 255, 257, 1000])
def test_an_odd_end_is_left_out(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    whole = data[: size // 256 * 256].view(np.int32)
    with Kernels(1) as kernels:
        assert kernels.read_seconds(data, 1, 1024)[1] == int(np.bitwise_xor.reduce(whole, initial=0))


@pytest.mark.parametrize("isa", isa_levels())
def test_arithmetic_has_a_rate(isa: str) -> None:
    with Kernels(2, isa) as kernels:
        assert kernels.int8_peak(100) > 0
        assert kernels.f32_peak(100) > 0
        for fmt in WeightFormat:
            assert kernels.matmul_peak(32, 64, 3, fmt, 32, 2) > 0
