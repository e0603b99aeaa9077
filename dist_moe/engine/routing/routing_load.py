"""Load of experts and balance of ranks, from records of a run's routing. Pure arithmetic on counts.

Shape suffixes: T tokens of a step, L routed layers, K experts per token, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe.engine.routing.routing_facts import RoutingFacts
from dist_moe.parallel.plan import CHUNK_READ_COST_TOKENS, EXPERT_LAYOUTS
from dist_moe.split import sliced_chunks, whole_chunks

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LayerLoad:
    """How the tokens of one layer (or of all layers together, then `layer` is None) spread over its experts.

    Attributes:
        hottest: The expert that most picks fell on, and its share of them.
        coldest: Likewise the fewest (the lowest number of several).
        never: How many experts no token picked.
        entropy_bits: Of the shares; log2 E where all experts are used alike.
        max_over_mean: Picks of the hottest expert over the mean of all; 1 where all are used alike.
    """

    layer: int | None
    picks: int
    hottest: tuple[int, float]
    coldest: tuple[int, float]
    never: int
    entropy_bits: float
    max_over_mean: float


@dataclass(frozen=True)
class Balance:
    """What a layout of experts makes of a record on a number of ranks.

    Attributes:
        slowdown: Time of the experts over that of equal work: each step's layer waits for its busiest rank. 1 is best.
        rank_shares: Each rank's share of all work.
    """

    layout: str
    ranks: int
    slowdown: float
    rank_shares: tuple[float, ...]


def layer_loads(counts_LE: Counts, layers: Sequence[int]) -> list[LayerLoad]:
    """One entry per routed layer.

    Args:
        counts_LE: How often each expert was picked.
        layers: The layers' numbers.
    """
    return [_load(counts_E, layer) for layer, counts_E in zip(layers, counts_LE, strict=True)]


def total_load(counts_LE: Counts) -> LayerLoad:
    """All layers together, as means over them; hottest and coldest are those of the sums over layers."""
    loads = [_load(counts_E, None) for counts_E in counts_LE]
    sums = _load(counts_LE.sum(axis=0), None)
    return LayerLoad(
        layer=None,
        picks=sums.picks,
        hottest=sums.hottest,
        coldest=sums.coldest,
        never=sum(load.never for load in loads),
        entropy_bits=float(np.mean([load.entropy_bits for load in loads])),
        max_over_mean=float(np.mean([load.max_over_mean for load in loads])),
    )


class LoadCounter:
    """Adds up steps: picks of each expert, and the work of each rank under each layout."""

    def __init__(self, facts: RoutingFacts, ranks: int) -> None:
        """Count for `ranks` ranks, whatever the job had."""
        self._facts = facts
        self._ranks = ranks
        E, chunks = facts.experts, facts.chunks_per_expert
        self._layers = np.array(facts.routed_layers)
        self._owned_ER = {
            "whole": _chunks_of_ranks(E, chunks, [whole_chunks(E, chunks, ranks, rank) for rank in range(ranks)]),
            "sliced": _chunks_of_ranks(E, chunks, [sliced_chunks(E, chunks, ranks, rank) for rank in range(ranks)]),
        }
        self._slowest = dict.fromkeys(EXPERT_LAYOUTS, 0)
        self._work_R = {layout: np.zeros(ranks, np.int64) for layout in EXPERT_LAYOUTS}
        self.counts_LE: Counts = np.zeros((len(self._layers), E), np.int64)
        self.tokens = 0
        self.steps = 0

    def add_step(self, experts_TLK: npt.NDArray[Any]) -> None:
        """Take the experts that one step's tokens picked; layers as in the model, dense ones included."""
        step_LE = self._count(experts_TLK)
        self.counts_LE += step_LE
        self.tokens += len(experts_TLK)
        self.steps += 1
        for layout in EXPERT_LAYOUTS:
            work_LR = self._work(layout, step_LE)
            self._slowest[layout] += int(work_LR.max(axis=1).sum())
            self._work_R[layout] += work_LR.sum(axis=0)

    def balances(self) -> list[Balance]:
        """What was added up, per layout."""
        return [self._balance(layout) for layout in EXPERT_LAYOUTS]

    def _balance(self, layout: str) -> Balance:
        work_R = self._work_R[layout]
        total = int(work_R.sum())
        shares = tuple((work_R / max(1, total)).tolist())
        slowdown = self._slowest[layout] * self._ranks / total if total else 1.0
        return Balance(layout, self._ranks, slowdown, shares)

    def _count(self, experts_TLK: npt.NDArray[Any]) -> Counts:
        L, E = self.counts_LE.shape
        first_L = np.arange(L, dtype=np.int64) * E
        numbers = experts_TLK[:, self._layers, :].astype(np.int64) + first_L[:, np.newaxis]
        return np.bincount(numbers.ravel(), minlength=L * E).reshape(L, E)

    def _work(self, layout: str, step_LE: Counts) -> Counts:
        """Each rank's work in each layer of one step, in products of a chunk with a token: int64 [L, R]."""
        cost_LE = np.where(step_LE > 0, step_LE + CHUNK_READ_COST_TOKENS, 0)
        if layout in self._owned_ER:
            return cost_LE @ self._owned_ER[layout]
        return self._dealt_out(cost_LE)

    def _dealt_out(self, cost_LE: Counts) -> Counts:
        """The shared layout: a chunk belongs to the run of equal work in which its middle lies (csrc/layer.c)."""
        L, chunks, ranks = len(cost_LE), self._facts.chunks_per_expert, self._ranks
        total_L = cost_LE.sum(axis=1) * chunks
        before_LE = np.cumsum(cost_LE, axis=1) * chunks - cost_LE * chunks
        layer_A, expert_A = np.nonzero(cost_LE)
        cost_A1 = cost_LE[layer_A, expert_A][:, np.newaxis]
        middle_AC = 2 * (before_LE[layer_A, expert_A][:, np.newaxis] + np.arange(chunks) * cost_A1) + cost_A1
        rank_AC = middle_AC * ranks // (2 * total_L[layer_A][:, np.newaxis])
        work = np.zeros(L * ranks, np.int64)
        np.add.at(work, (layer_A[:, np.newaxis] * ranks + rank_AC).ravel(), np.repeat(cost_A1, chunks))
        return work.reshape(L, ranks)


def _chunks_of_ranks(experts: int, chunks: int, owned: Sequence[Sequence[int]]) -> Counts:
    """How many chunks of each expert each rank owns, int64 [E, R]."""
    return np.stack([np.bincount(np.array(own, np.int64) // chunks, minlength=experts) for own in owned], axis=1)


def _load(counts_E: Counts, layer: int | None) -> LayerLoad:
    picks = int(counts_E.sum())
    share_E = counts_E / max(1, picks)
    used = share_E[share_E > 0]
    hottest, coldest = int(counts_E.argmax()), int(counts_E.argmin())
    return LayerLoad(
        layer=layer,
        picks=picks,
        hottest=(hottest, float(share_E[hottest])),
        coldest=(coldest, float(share_E[coldest])),
        never=int((counts_E == 0).sum()),
        entropy_bits=abs(float(-(used * np.log2(used)).sum())),
        max_over_mean=float(share_E.max() * len(counts_E)),
    )
