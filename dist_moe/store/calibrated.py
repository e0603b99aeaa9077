"""The importance of a matrix's columns, from a calibration.

D model dim, E experts, F hidden units of an expert, C columns of a matrix.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_moe.store.calibration import LEAST_TOKENS, Calibration, Doubles, LayerMoments
from dist_moe.store.calibration_file import fingerprint_of

Floats = npt.NDArray[np.float32]

_OF_ATTENTION = {"q": "input_D", "k": "input_D", "v": "input_D", "o": "output_C"}


class CalibratedImportance:
    """Mean squares of what columns are multiplied with (an `Importance`).

    An expert with fewer than LEAST_TOKENS tokens takes the mean of its layer's experts.
    """

    def __init__(self, calibration: Calibration) -> None:
        """Of one calibration."""
        self._calibration = calibration

    @property
    def fingerprint(self) -> str:
        """A text that tells it apart from others."""
        return fingerprint_of(self._calibration)

    def importance_C(self, name: str) -> Floats | None:
        """Mean squares, float32 [columns], 1 on average; None for a matrix that calibration does not know.

        Args:
            name: The logical name of a matrix, such as "layers.0.experts.3.down".
        """
        mean_C = self.mean_squares(name)
        average = 0.0 if mean_C is None else float(mean_C.mean())
        if mean_C is None or average == 0:
            return None  # nothing is known, or all columns read zeros: all count alike
        return (mean_C / average).astype(np.float32)

    def mean_energy(self, name: str) -> Doubles:
        """What a token of the text puts through each column on average, float64 [columns]; of all packed matrices.

        An expert counts by its tokens and their routing weights squared.
        """
        found_C = self.mean_squares(name)
        assert found_C is not None, name
        parts = name.split(".")
        if parts[-1] not in ("gate", "up", "down"):
            return found_C
        tokens = max(1, int(self._calibration.layers[int(parts[1])].tokens_E[int(parts[3])]))
        shared_C: Doubles = found_C * (tokens / max(self._calibration.tokens, 1))
        return shared_C

    def mean_squares(self, name: str) -> Doubles | None:
        """Mean squares, float64 [columns]; None for a matrix that calibration does not know."""
        calibration = self._calibration
        if name == "lm_head":
            return calibration.final_D / max(calibration.tokens, 1)
        parts = name.split(".")
        if parts[0] != "layers" or parts[-1] not in (*_OF_ATTENTION, "gate", "up", "down"):
            return None
        moments = calibration.layers[int(parts[1])]
        if parts[-1] in _OF_ATTENTION:
            sums: Doubles = getattr(moments, _OF_ATTENTION[parts[-1]])
            return sums / max(calibration.tokens, 1)
        return _of_expert(moments, parts[-1], int(parts[3]))


def _of_expert(moments: LayerMoments, key: str, expert: int) -> Doubles:
    tokens = int(moments.tokens_E[expert])
    if tokens < LEAST_TOKENS:
        return moments.mean_hidden_F if key == "down" else moments.mean_experts_D
    mean_C: Doubles = (moments.hidden_EF if key == "down" else moments.experts_ED)[expert] / tokens
    return mean_C
