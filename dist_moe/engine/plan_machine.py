"""What this machine allows, for `dist-moe plan`: the reading loop and the arithmetic of bench, without a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from dist_moe.engine.available_memory import available_memory
from dist_moe.engine.bench_bound import Machine
from dist_moe.engine.bench_machine import FINALISTS, PASSES, WAYS, columns_in_cache
from dist_moe.kernels import Kernels, WeightFormat

_READ_BYTES = 1 << 30
_SAMPLE_BYTES = 1 << 28  # to choose the best way to read
_PEAK_S = 0.05
_FIRST_ROUNDS = 256
_TILE_ROWS, _GROUP = 32, 32  # of the matrix in L1


def measure_machine(threads: int, fmt: WeightFormat, read: float | None = None) -> tuple[Machine, str]:
    """Measure with `threads` threads; takes about two seconds.

    Args:
        threads: As many as will compute on a node.
        fmt: The format of the weights, for our matmul.
        read: Bytes/s of a node that are known already; None measures.

    Returns:
        What was found, and the kernels' level.
    """
    with Kernels(threads) as kernels:
        bytes_per_s = _read_speed(kernels) if read is None else read
        matmul = max(
            _best(partial(kernels.matmul_peak, _TILE_ROWS, columns_in_cache(fmt, tokens), tokens, fmt, _GROUP))
            for tokens in (8, 16, 32)
        )
        return Machine(bytes_per_s, matmul, _best(kernels.f32_peak)), kernels.isa


def _read_speed(kernels: Kernels) -> float:
    """Bytes per second over anonymous memory, in the best way."""
    size = _READ_BYTES
    if free := available_memory().available_bytes:
        size = max(1 << 24, min(size, free // 4))
    data = np.ones(size, np.uint8)
    kernels.read_seconds(data, 4, 0)
    sample = data[:_SAMPLE_BYTES]
    ways = sorted(WAYS, key=lambda way: kernels.read_seconds(sample, *way)[0])[:FINALISTS]
    return size / min(kernels.read_seconds(data, *way)[0] for way in ways for _ in range(PASSES))


def _best(run: Callable[[int], float]) -> float:
    """The best of a few passes, each so long that starting the threads does not count."""
    started_s = time.perf_counter()
    run(_FIRST_ROUNDS)
    rounds = max(1, int(_FIRST_ROUNDS * _PEAK_S / (time.perf_counter() - started_s)))
    return max(run(rounds) for _ in range(PASSES))
