"""How often each expert is picked, and which ones together: counted over a text, or assumed.

Shape suffixes: L routed layers, E experts, S sampled tokens, K experts per token, T tokens of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.engine.routing.routing_facts import RoutingFacts
from dist_moe.engine.routing.routing_record import RoutingBatch

MOST_SAMPLES = 2048
ASSUMED_SAMPLES = 1024
SEED = 20261121


@dataclass(frozen=True, eq=False)
class RoutingProfile:
    """Routing of a text.

    Attributes:
        origin: What it was counted over, or what was assumed, in words.
        layers: Numbers of the routed layers, ascending.
        tokens: How many were counted.
        counts_LE: int64 [L, E], how often each expert was picked.
        sets_LSK: int16 or int32 [L, S, K], the experts that single tokens picked: an even sample of all of them.
        assumed: Whether nothing was counted.
    """

    origin: str
    layers: tuple[int, ...]
    tokens: int
    counts_LE: npt.NDArray[np.int64]
    sets_LSK: npt.NDArray[np.signedinteger]
    assumed: bool = False

    def load_E(self, index: int) -> npt.NDArray[np.float64]:
        """Each expert's share of the picks in the routed layer `index`; never 0, so that none counts as free."""
        counts_E = self.counts_LE[index] + 0.5
        load_E: npt.NDArray[np.float64] = counts_E / counts_E.sum()
        return load_E


class ProfileCounter:
    """Adds up steps, keeping every 2^n-th token's picks: as many as there is room for."""

    def __init__(self, facts: RoutingFacts, most_samples: int = MOST_SAMPLES) -> None:
        """Count for a model; `most_samples` is even."""
        self._layers = np.array(facts.routed_layers)
        self._experts = facts.experts
        self._samples: list[npt.NDArray[np.signedinteger]] = []
        self._most = most_samples
        self._stride = 1
        self.tokens = 0
        self.counts_LE: npt.NDArray[np.int64] = np.zeros((len(self._layers), facts.experts), np.int64)

    def add(self, batch: RoutingBatch) -> None:
        """Take one step (a sink of `RoutingRecorder`)."""
        self.add_picks(batch.experts_TLK)

    def add_picks(self, experts_TLK: npt.NDArray[np.signedinteger]) -> None:
        """Take the experts that one step's tokens picked; layers as in the model, dense ones included."""
        picked_TLK = experts_TLK[:, self._layers, :]
        numbers = picked_TLK.astype(np.int64) + (np.arange(len(self._layers)) * self._experts)[:, np.newaxis]
        self.counts_LE += np.bincount(numbers.ravel(), minlength=self.counts_LE.size).reshape(self.counts_LE.shape)
        for token in range(len(picked_TLK)):
            if (self.tokens + token) % self._stride == 0:
                self._keep(picked_TLK[token].copy())
        self.tokens += len(picked_TLK)

    def profile(self, origin: str) -> RoutingProfile:
        """What was added up; at least one token was."""
        sets_LSK = np.stack(self._samples, axis=1)
        return RoutingProfile(origin, tuple(self._layers.tolist()), self.tokens, self.counts_LE, sets_LSK)

    def _keep(self, picked_LK: npt.NDArray[np.signedinteger]) -> None:
        self._samples.append(picked_LK)
        if len(self._samples) > self._most:
            self._samples = self._samples[::2]
            self._stride *= 2


def assumed_profile(layers: tuple[int, ...], experts: int, picks: int, zipf: float) -> RoutingProfile:
    """Routing by chance: an expert's weight is its rank to the power -zipf, in an order of its own in each layer.

    Args:
        layers: The routed layers.
        experts: E.
        picks: K.
        zipf: 0 makes all experts equally likely, alike in all layers.
    """
    generator = np.random.default_rng(SEED)
    sets = []
    for _ in layers if zipf else layers[:1]:
        weight_E = (generator.permutation(experts) + 1.0) ** -zipf
        # The largest of log(weight) + Gumbel noise are a draw without putting back.
        keys_SE = np.log(weight_E) + generator.gumbel(size=(ASSUMED_SAMPLES, experts))
        sets.append(np.argsort(-keys_SE, axis=1, kind="stable")[:, :picks])
    sets_LSK = np.stack(sets if zipf else sets * len(layers)).astype(np.int32)
    counts = [np.bincount(sets_SK.ravel(), minlength=experts) for sets_SK in sets_LSK]
    origin = f"Zipf routing with exponent {zipf:g}, by chance" if zipf else "all experts equally likely"
    counts_LE = np.stack(counts) if zipf else np.full((len(layers), experts), ASSUMED_SAMPLES, np.int64)
    return RoutingProfile(origin, layers, ASSUMED_SAMPLES, counts_LE, sets_LSK, assumed=True)
