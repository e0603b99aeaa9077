"""The experts that a run's tokens picked, step by step, as rank 0 sees them: every rank routes every token.

Shape suffixes: T tokens of a step, L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe.model.transformer import Transformer

DENSE = -1  # in place of an expert, in layers without a router


@dataclass(frozen=True)
class RoutingBatch:
    """The routing of one step's tokens; the arrays are valid only while a sink is told.

    Attributes:
        step: Number of the step, from 0.
        sequence_T: int32 [T], which sequence each token belongs to, by the KV cache's count.
        position_T: int32 [T].
        ids_T: int32 [T], the tokens.
        experts_TLK: int16 (int32 where a model has more experts) [T, L, K], best first; DENSE in dense layers.
        weights_TLK: float32 [T, L, K], what each expert's output is multiplied with; 0 in dense layers.
    """

    step: int
    sequence_T: npt.NDArray[np.int32]
    position_T: npt.NDArray[np.int32]
    ids_T: npt.NDArray[np.int32]
    experts_TLK: npt.NDArray[Any]
    weights_TLK: npt.NDArray[np.float32]


RoutingSink = Callable[[RoutingBatch], None]


class RoutingRecorder:
    """An observer of a transformer that tells the routing of each step at its end."""

    def __init__(self, model: Transformer, sinks: Sequence[RoutingSink]) -> None:
        """Tell every sink of every step; nothing is copied for them."""
        self._model = model
        self._sinks = sinks
        self._layers = model.config.layers
        self._routed = frozenset(layer for layer in range(self._layers) if not model.config.is_dense(layer))
        self._steps = 0
        self._experts_TLK = np.empty((0, self._layers, model.config.experts_per_token), expert_dtype(model))
        self._weights_TLK = np.empty(self._experts_TLK.shape, np.float32)

    def observe(self, layer: int, half: str, _: npt.NDArray[np.float32]) -> None:
        """Note a layer's routing (the transformer's observer)."""
        if half != "experts":
            return
        T = len(self._model.picked_TK)
        if layer == 0 and len(self._experts_TLK) < T:
            self._make_room(T)
        if layer in self._routed:
            self._experts_TLK[:T, layer] = self._model.picked_TK
            self._weights_TLK[:T, layer] = self._model.picked_weights_TK
        if layer == self._layers - 1:
            self._tell(T)

    def _make_room(self, tokens: int) -> None:
        shape = (tokens, *self._experts_TLK.shape[1:])
        self._experts_TLK = np.full(shape, DENSE, self._experts_TLK.dtype)
        self._weights_TLK = np.zeros(shape, np.float32)

    def _tell(self, tokens: int) -> None:
        step = self._model.last_step
        lengths = [len(part.ids) for part in step.slices]
        batch = RoutingBatch(
            step=self._steps,
            sequence_T=np.repeat(np.array([part.sequence for part in step.slices], np.int32), lengths),
            position_T=np.concatenate([np.arange(len(part.ids)) + part.position for part in step.slices]).astype(
                np.int32
            ),
            ids_T=step.flat_ids(),
            experts_TLK=self._experts_TLK[:tokens],
            weights_TLK=self._weights_TLK[:tokens],
        )
        self._steps += 1
        for sink in self._sinks:
            sink(batch)


@contextmanager
def recorded_routing(model: Transformer, *sinks: RoutingSink) -> Iterator[None]:
    """Tell sinks the routing of every step inside the block; on rank 0 alone, where `engine.runtime.model` is one."""
    model.observer = RoutingRecorder(model, sinks).observe if sinks else None
    try:
        yield
    finally:
        model.observer = None


def expert_dtype(model: Transformer) -> type[np.signedinteger[Any]]:
    """The type that a model's expert numbers are kept in."""
    return np.int16 if model.config.experts <= np.iinfo(np.int16).max else np.int32
