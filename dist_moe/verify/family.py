"""A kernel, its inputs and its definition."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dist_moe.kernels import Kernels
from dist_moe.kernels.arrays import F32Array
from dist_moe.verify.check import Arrays

# Of the largest value: chains of up to some 200 f32 operations, each off by 2^-24 = 6e-8 at most, that mostly cancel.
ROUNDING = 2e-6


@dataclass(frozen=True)
class Family:
    """What a kernel computes in one format.

    Attributes:
        kernel: Its name for people.
        variant: The format, or "".
        run: Its results at some level; the same bits at each.
        define: The same in float64, or exactly, from NumPy; it is given the portable level's results.
        tolerance: Between both; None: they are equal bit for bit.
        view: What of the results the definition speaks of.
    """

    kernel: str
    variant: str
    run: Callable[[Kernels], Arrays]
    define: Callable[[Arrays], Arrays]
    tolerance: float | None
    view: Callable[[Arrays], Arrays] = lambda found: found

    @property
    def name(self) -> str:
        """Kernel and variant."""
        return f"{self.kernel}, {self.variant}" if self.variant else self.kernel


class Random:
    """Numbers that a name decides."""

    def __init__(self, name: str) -> None:
        """Seed by the name."""
        self._generator = np.random.default_rng(zlib.crc32(name.encode()))

    def floats(self, *shape: int, scale: float = 1.0) -> F32Array:
        """Normal float32."""
        return (self._generator.standard_normal(shape) * scale).astype(np.float32)

    def uniform(self, count: int) -> F32Array:
        """float32 in [0.05, 1)."""
        return self._generator.uniform(0.05, 1, count).astype(np.float32)
