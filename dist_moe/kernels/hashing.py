"""A fast hash of floats, by which ranks notice that one of them holds other numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_moe.kernels.arrays import F32
from dist_moe.kernels.library import lib


def hash_floats(values: npt.NDArray[np.float32], seed: int = 0) -> int:
    """XXH64 of the values' bytes, with every NaN as 0x7fc00000 (its payload is not promised to be equal everywhere).

    Args:
        values: f32, C-contiguous, any shape but a scalar's.
        seed: The hash of what came before, or 0.

    Returns:
        An unsigned 64-bit number.
    """
    return int(lib.dm_hash_floats(F32.read(values, *values.shape), values.size, seed))
