"""What a store of some format keeps of weights.

R rows, C columns of a matrix.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import Kernels, PackMatrix, ScaleChoice, aligned_empty, packed_bytes
from dist_moe.kernels.formats import MatrixFormat

Floats = npt.NDArray[np.float32]


def round_weights(kernels: Kernels, values_RC: Floats, found: MatrixFormat, importance_C: Floats | None) -> Floats:
    """Weights packed with scales of least squared error and unpacked again.

    Args:
        kernels: What packs.
        values_RC: float32 rows without gaps.
        found: The format.
        importance_C: How much each column's squared error counts; None: all the same.

    Returns:
        A new float32 [R, C].
    """
    rows, columns = values_RC.shape
    packed = aligned_empty(packed_bytes(found.format, rows, columns, found.group), np.uint8)
    matrix = PackMatrix(packed, values_RC, rows, columns, found.group, None, importance_C)
    kernels.pack_matrices([matrix], found.format, ScaleChoice.MSE)
    rounded_RC = np.empty_like(values_RC)
    kernels.unpack(rounded_RC, packed, found.format, found.group)
    return rounded_RC
