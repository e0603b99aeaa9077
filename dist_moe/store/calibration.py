"""What a text drives through each matrix of a model: the sums that weight errors of quantization.

Shape suffixes: D model dim, C = heads * head_dim columns of o_proj, E experts of a layer (1: a dense MLP), F hidden
units of each expert.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe.kernels.formats import MatrixFormat, WeightFormat
from dist_moe.model_config import ModelConfig

Doubles = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

# Matrices whose sensitivity is measured together, in each layer; after those of all layers comes lm_head.
GROUPS_OF_LAYER = (("q",), ("k",), ("v",), ("o",), ("gate", "up"), ("down",))
# What they are rounded to for that, with scales of least squared error.
REFERENCE = MatrixFormat(WeightFormat.Q4, 32)

# With fewer tokens than so, an expert's own sums are noise: its layer's mean over experts stands in.
LEAST_TOKENS = 32


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """One layer's sums of squares over all tokens of a text, by input channel.

    Attributes:
        input_D: Of q, k and v.
        output_C: Of o_proj.
        experts_ED: Of gate and up, over the tokens routed to each expert, times their routing weights squared.
        hidden_EF: Of down, likewise.
        tokens_E: int64, how many those are.
        mass_E: The sum of their routing weights.
        residual_2D: Of the residual after attention, and after the experts.
    """

    input_D: Doubles
    output_C: Doubles
    experts_ED: Doubles
    hidden_EF: Doubles
    tokens_E: Counts
    mass_E: Doubles
    residual_2D: Doubles

    def values(self) -> list[npt.NDArray[Any]]:
        """All arrays, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    @cached_property
    def sparse(self) -> tuple[int, ...]:
        """The experts with fewer than LEAST_TOKENS tokens, those that were never routed included."""
        return tuple(np.flatnonzero(self.tokens_E < LEAST_TOKENS).tolist())

    @cached_property
    def mean_experts_D(self) -> Doubles:
        """Mean squares of gate and up over all routed tokens, which stand in for a sparse expert's own."""
        return self._mean_over_experts(self.experts_ED)

    @cached_property
    def mean_hidden_F(self) -> Doubles:
        """The same of down."""
        return self._mean_over_experts(self.hidden_EF)

    def _mean_over_experts(self, sums_EC: Doubles) -> Doubles:
        mean_C: Doubles = sums_EC.sum(axis=0) / max(int(self.tokens_E.sum()), 1)
        mean_C.flags.writeable = False  # every sparse expert reads this one array
        return mean_C

    @property
    def unrouted(self) -> tuple[int, ...]:
        """The experts that no token was routed to."""
        return tuple(np.flatnonzero(self.tokens_E == 0).tolist())


@dataclass(frozen=True, eq=False)
class Calibration:
    """The sums of a whole model over one or more texts.

    Attributes:
        model, fingerprint: The source that the store was made from: its name, and what tells it apart.
        texts: Names of the texts, sorted.
        tokens: How many tokens were read.
        layers: By layer.
        final_D: Of lm_head.
        sensitive_G: Of each group of matrices (see GROUPS_OF_LAYER), the divergences (nats) that rounding it alone to
            REFERENCE makes of the model's predictions, added up; zeros where it was not measured.
        sensitive_tokens: Over how many tokens those are.
    """

    model: str
    fingerprint: str
    texts: tuple[str, ...]
    tokens: int
    layers: tuple[LayerMoments, ...]
    final_D: Doubles
    sensitive_G: Doubles
    sensitive_tokens: int = 0


def moment_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """The shape of each of a layer's arrays, in the order of the fields of `LayerMoments`."""
    experts, model_dim = config.layer_experts(layer), config.model_dim
    return {
        "input_D": (model_dim,),
        "output_C": (config.heads * config.head_dim,),
        "experts_ED": (experts, model_dim),
        "hidden_EF": (experts, config.layer_hidden(layer)),
        "tokens_E": (experts,),
        "mass_E": (experts,),
        "residual_2D": (2, model_dim),
    }


def merge(calibrations: list[Calibration]) -> Calibration:
    """Several calibrations of one model as one; the sums are taken in the order of the list."""
    first = calibrations[0]
    return Calibration(
        model=first.model,
        fingerprint=first.fingerprint,
        texts=tuple(sorted({text for calibration in calibrations for text in calibration.texts})),
        tokens=sum(calibration.tokens for calibration in calibrations),
        layers=tuple(
            _merge_layers([calibration.layers[layer] for calibration in calibrations])
            for layer in range(len(first.layers))
        ),
        final_D=_sum([calibration.final_D for calibration in calibrations]),
        sensitive_G=_sum([calibration.sensitive_G for calibration in calibrations]),
        sensitive_tokens=sum(calibration.sensitive_tokens for calibration in calibrations),
    )


def _merge_layers(layers: list[LayerMoments]) -> LayerMoments:
    return LayerMoments(
        **{field.name: _sum([getattr(layer, field.name) for layer in layers]) for field in fields(LayerMoments)}
    )


def _sum(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    total = arrays[0].copy()
    for array in arrays[1:]:
        total += array
    return total


def group_count(layers: int) -> int:
    """Groups of matrices of a model whose sensitivity is measured."""
    return len(GROUPS_OF_LAYER) * layers + 1
