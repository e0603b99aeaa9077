"""Sums of squares of what the matrices of a running model read, for calibration: the same bits on any ranks.

What an expert reads counts with its routing weight squared, as the error does that it makes of it.

Each sum is one rank's alone, taken in float64 over the tokens of the text in their order, whatever the steps.
Shape suffixes: T tokens of a step, D model dim, K experts per token, E experts, F hidden units of an expert, N tokens
of one expert, W ranks.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe.engine.calibration.hidden_units import HiddenUnits
from dist_moe.model.transformer import Transformer
from dist_moe.parallel.exchange import Exchange
from dist_moe.store.calibration import Doubles, LayerMoments, moment_shapes

Floats = npt.NDArray[np.float32]
Sums = tuple[tuple[LayerMoments, ...], Doubles]  # by layer, and of lm_head
_MASS_SCALE = 2.0**24  # routing weights as integers, which float64 adds up exactly for 2^29 tokens


class Calibrator:
    """One rank's part of a calibration. `begin` and `end` are collective."""

    def __init__(self, model: Transformer, exchange: Exchange) -> None:
        """Calibrate this model over these ranks; nothing is allocated before `begin`."""
        self._model, self._exchange = model, exchange
        self._counter: MomentCounter | None = None

    def begin(self) -> None:
        """Watch every step from now on; they may not be partitioned by tokens."""
        self._counter = MomentCounter(self._model)
        self._model.observer = self._counter.observe

    def end(self) -> Sums | None:
        """Stop watching.

        Returns:
            On rank 0 the sums by layer, and those of lm_head; None elsewhere.
        """
        counter, self._model.observer, self._counter = self._counter, None, None
        assert counter is not None
        layers = tuple(LayerMoments(*map(self._sum_of_ranks, moments.values())) for moments in counter.layers)
        sums = layers, self._sum_of_ranks(counter.final_D)
        return sums if self._model.share.plan.rank == 0 else None

    def _sum_of_ranks(self, own: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What one rank has and the others have zeros for, on rank 0; elsewhere this rank's own."""
        all_W = self._exchange.gather_equal(own)
        return own if all_W is None else np.asarray(all_W.sum(axis=0))


class MomentCounter:
    """An observer of a transformer that adds up this rank's share of the sums; the others' stay 0."""

    def __init__(self, model: Transformer) -> None:
        """Allocate all sums."""
        self._model = model
        plan, config = model.share.plan, model.config
        self._rank, self._ranks = plan.rank, plan.ranks
        columns_hP = [np.arange(head * config.head_dim, (head + 1) * config.head_dim) for head in plan.heads]
        self._columns = np.concatenate(columns_hP) if columns_hP else np.zeros(0, np.int64)
        self._hidden = HiddenUnits(model)
        self.layers = tuple(_zeros(moment_shapes(config, layer)) for layer in range(config.layers))
        self.final_D = np.zeros(config.model_dim)

    def observe(self, layer: int, half: str, x_TD: Floats) -> None:
        """Take what a layer's matrices have read (the transformer's observer)."""
        assert not self._model.last_step.partitioned, "a rank sees its own tokens alone"
        place = ("attention", "experts").index(half)
        if self._is_own(2 * layer + place):
            add_squares(self.layers[layer].residual_2D[place], x_TD)
        if half == "attention":
            self._take_attention(layer)
            return
        self._take_experts(layer)
        if layer == self._model.config.layers - 1 and self._is_own(layer + 1):
            self._take_final(x_TD)

    def _is_own(self, number: int) -> bool:
        """Whether this rank adds up what all of them have."""
        return number % self._ranks == self._rank

    def _take_attention(self, layer: int) -> None:
        moments, model = self.layers[layer], self._model
        if self._is_own(layer):
            add_squares(moments.input_D, model.normed_TD)
        own_C = moments.output_C[self._columns]
        add_squares(own_C, model.attended_TC)
        moments.output_C[self._columns] = own_C

    def _take_experts(self, layer: int) -> None:
        moments, model = self.layers[layer], self._model
        normed_TD = model.normed_TD
        if model.config.is_dense(layer):
            ids_TK: npt.NDArray[np.int32] = np.zeros((len(normed_TD), 1), np.int32)
            weights_TK: Floats = np.ones(ids_TK.shape, np.float32)
        else:
            ids_TK, weights_TK = model.picked_TK, model.picked_weights_TK
        experts = len(moments.tokens_E)
        choices = np.argsort(ids_TK, axis=None, kind="stable")
        counts_E = np.bincount(ids_TK.ravel(), minlength=experts)
        if self._rank == 0:
            moments.tokens_E[:] += counts_E
            integers_TK = np.rint(weights_TK.astype(np.float64) * _MASS_SCALE)
            mass_E = np.bincount(ids_TK.ravel(), integers_TK.ravel(), minlength=experts)
            moments.mass_E[:] += mass_E / _MASS_SCALE
        for expert, chosen_N in enumerate(np.split(choices, np.cumsum(counts_E)[:-1])):
            if len(chosen_N):
                rows_ND = normed_TD[chosen_N // ids_TK.shape[1]]
                self._take_expert(layer, expert, rows_ND, weights_TK.ravel()[chosen_N])

    def _take_expert(self, layer: int, expert: int, rows_ND: Floats, weight_N: Floats) -> None:
        moments = self.layers[layer]
        if self._is_own(expert):
            add_squares(moments.experts_ED[expert], rows_ND, weight_N)
        if (columns := self._hidden.columns(layer, expert)) is not None:
            own_F = moments.hidden_EF[expert, columns]
            add_squares(own_F, self._hidden.of(layer, expert, rows_ND), weight_N)
            moments.hidden_EF[expert, columns] = own_F

    def _take_final(self, x_TD: Floats) -> None:
        model = self._model
        normed_TD = np.empty_like(x_TD)
        model.kernels.rmsnorm(normed_TD, x_TD, model.weights.final_norm_D, model.config.eps)
        add_squares(self.final_D, normed_TD)


def add_squares(total_C: Doubles, rows_NC: npt.NDArray[np.floating], weight_N: Floats | None = None) -> None:
    """Add the squares of rows times their weights, one row after the other: the same bits however a text is cut.

    NumPy adds along the first axis row by row.
    """
    squares_NC = np.empty((len(rows_NC) + 1, rows_NC.shape[1]))
    squares_NC[0] = total_C
    scaled_NC = rows_NC if weight_N is None else rows_NC * weight_N.astype(np.float64)[:, np.newaxis]
    np.multiply(scaled_NC, scaled_NC, out=squares_NC[1:], dtype=np.float64)
    np.add.reduce(squares_NC, axis=0, out=total_C)


def _zeros(shapes: dict[str, tuple[int, ...]]) -> LayerMoments:
    arrays: dict[str, Any] = {
        name: np.zeros(shape, np.int64 if name == "tokens_E" else np.float64) for name, shape in shapes.items()
    }
    assert list(arrays) == [field.name for field in fields(LayerMoments)]
    return LayerMoments(**arrays)
