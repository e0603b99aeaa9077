"""Load and balance against sums chunk by chunk, the dealt-out chunks as C deals them."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from dist_moe.engine.routing.routing_facts import RoutingFacts
from dist_moe.engine.routing.routing_load import LoadCounter, layer_loads, total_load
from dist_moe.kernels import Kernels, Picks, Workers
from dist_moe.parallel.chunk_owners import sliced_owners, whole_owners
from dist_moe.parallel.plan import CHUNK_READ_COST_TOKENS as READ_COST
from helpers.weightless import weightless_layer

FACTS = RoutingFacts(
    model="tiny",
    layers=4,
    experts=12,
    experts_per_token=3,
    routed_layers=(0, 2, 3),
    chunks_per_expert=5,
    ranks=2,
    layout="whole",
)


def random_steps(tokens: tuple[int, ...]) -> list[np.ndarray]:
    """Random picks, a few experts often, int16 [T, 4, 3] each; layer 1 is dense."""
    generator = np.random.default_rng(5)
    weights_E = np.arange(1, 13) ** 2.0
    steps = []
    for count in tokens:
        picks = [generator.choice(12, 3, replace=False, p=weights_E / weights_E.sum()) for _ in range(count * 4)]
        steps.append(np.array(picks, np.int16).reshape(count, 4, 3))
        steps[-1][:, 1] = -1
    return steps


def work_of_ranks(layout: str, tokens_E: np.ndarray, ranks: int) -> list[int]:
    """Each rank's work in one layer, from the plan's own list of chunks or from the kernel's."""
    work = []
    for rank in range(ranks):
        owners = {"whole": whole_owners, "sliced": sliced_owners}.get(layout)
        owned = owners(np.ones((1, 60), np.bool_), 12, [range(ranks)])[rank] if owners else None
        layer = weightless_layer(12, 60, owned, experts_per_token=3)
        offset_E1 = np.concatenate([[0], np.cumsum(tokens_E)]).astype(np.int32)
        words = Kernels.pick_chunks(Picks(1, 12), layer, offset_E1, Workers(0, rank, ranks, READ_COST)).astype(np.int64)
        work.append(int((words[:, 3][words[:, 3] > 0] + READ_COST).sum()))
    return work


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 16])
def test_the_balance_is_that_of_the_chunks_that_ranks_compute(ranks: int) -> None:
    steps = random_steps((40, 1, 1, 2, 300))
    counter = LoadCounter(FACTS, ranks)
    for step in steps:
        counter.add_step(step)
    assert (counter.steps, counter.tokens) == (5, 344)
    for balance in counter.balances():
        slowest, sums = 0, np.zeros(ranks)
        for step in steps:
            for layer in FACTS.routed_layers:
                work = work_of_ranks(balance.layout, np.bincount(step[:, layer].ravel(), minlength=12), ranks)
                slowest += max(work)
                sums += work
        assert balance.slowdown == pytest.approx(slowest * ranks / sums.sum(), rel=1e-12)
        assert balance.rank_shares == pytest.approx((sums / sums.sum()).tolist(), rel=1e-12)
        assert balance.slowdown >= 1
    if ranks == 1:
        assert {balance.slowdown for balance in counter.balances()} == {1.0}


def test_loads_are_counted_per_layer() -> None:
    steps = random_steps((30, 1, 7))
    counter = LoadCounter(FACTS, 1)
    for step in steps:
        counter.add_step(step)
    loads = layer_loads(counter.counts_LE, FACTS.routed_layers)
    assert [load.layer for load in loads] == [0, 2, 3]
    for load in loads:
        counts = Counter(np.concatenate([step[:, load.layer].ravel() for step in steps]).tolist())
        shares = [counts[expert] / (38 * 3) for expert in range(12)]
        assert load.picks == 38 * 3
        assert load.hottest == (shares.index(max(shares)), pytest.approx(max(shares)))
        assert load.coldest == (shares.index(min(shares)), pytest.approx(min(shares)))
        assert load.never == shares.count(0)
        assert load.entropy_bits == pytest.approx(-sum(share * math.log2(share) for share in shares if share))
        assert load.max_over_mean == pytest.approx(max(shares) * 12)
    everything = total_load(counter.counts_LE)
    assert (everything.layer, everything.picks) == (None, 3 * 38 * 3)
    assert everything.never == sum(load.never for load in loads)


def test_equal_use_is_balanced() -> None:
    experts = np.arange(12, dtype=np.int16).reshape(4, 1, 3).repeat(4, axis=1)
    counter = LoadCounter(FACTS, 3)
    counter.add_step(experts)
    (load, *_) = layer_loads(counter.counts_LE, FACTS.routed_layers)
    assert (load.entropy_bits, load.max_over_mean, load.never) == (pytest.approx(math.log2(12)), pytest.approx(1), 0)
    assert [balance.slowdown for balance in counter.balances()] == pytest.approx([1, 1, 1])
