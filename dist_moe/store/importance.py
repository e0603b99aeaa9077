"""How much the error of each column of a matrix counts when its scales are chosen.

C matrix columns.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from dist_moe.errors import UsageError

Floats = npt.NDArray[np.float32]

_ALL = slice(None)


class Importance(Protocol):
    """What calibration has found of a model's matrices."""

    @property
    def fingerprint(self) -> str:
        """A text that tells it apart from others; a store's manifest keeps it."""

    def importance_C(self, name: str) -> Floats | None:
        """Weights of the squared errors, float32 [columns], finite and >= 0; None: all columns count alike.

        Args:
            name: The logical name of a matrix, such as "layers.0.experts.3.down".
        """


def column_importance(
    importance: Importance | None, name: str, matrix_columns: int, columns: slice | None = None, width: int = 0
) -> Floats | None:
    """What packing takes for some columns of a matrix: float32 [columns], zeros up to `width`, or None.

    Raises:
        UsageError: The importance is of a matrix of another shape, or has values that are no weights.
    """
    whole = None if importance is None else importance.importance_C(name)
    if whole is None:
        return None
    if whole.shape != (matrix_columns,):
        raise UsageError(
            f"the importance of {name} is of {whole.shape[0]} columns, not of {matrix_columns}; calibrate this model"
        )
    chosen = np.ascontiguousarray(whole[_ALL if columns is None else columns], np.float32)
    if not (np.isfinite(chosen) & (chosen >= 0)).all():
        raise UsageError(f"the importance of {name} has values that are NaN, infinite or below 0; calibrate again")
    missing = width - len(chosen)
    return np.concatenate([chosen, np.zeros(missing, np.float32)]) if missing > 0 else chosen
