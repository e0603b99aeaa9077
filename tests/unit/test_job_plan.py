"""Units to nodes by what they hold, then to their ranks: each has one owner, and nobody idles needlessly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.model_config import ModelConfig
from dist_moe.parallel.holdings import Holdings, everything_held
from dist_moe.parallel.owners import balanced_owners
from dist_moe.parallel.plan import EXPERT_LAYOUTS, JobPlan, in_order, plan_job
from dist_moe.split import contiguous, sliced_chunks, whole_chunks
from helpers.models import model

# Layers with experts, one dense; three KV heads of four query heads each; the last block of lm_head is short.
CONFIG = model(layers=3, heads=12, kv_heads=3, experts=5, experts_per_token=2, expert_hidden=256, vocabulary=900)
GROUP_SIZE = 32
SHARDS = 4


@st.composite
def held_units(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    """Up to 5 nodes with up to 4 ranks, and up to 14 units that are on one node or more."""
    nodes = draw(st.integers(1, 5))
    ranks = draw(st.lists(st.integers(1, 4), min_size=nodes, max_size=nodes))
    holders = draw(st.lists(st.sets(st.integers(0, nodes - 1), min_size=1), max_size=14))
    held_NU = np.zeros((nodes, len(holders)), np.bool_)
    for unit, of_unit in enumerate(holders):
        held_NU[sorted(of_unit), unit] = True
    return held_NU, ranks


def loads_of_ranks(owner_U: Sequence[int], ranks_N: Sequence[int]) -> list[int]:
    """Units of each rank, most first, when each node's are cut evenly."""
    units_N = Counter(owner_U)
    loads = [
        len(contiguous(units_N[node], ranks, place)) for node, ranks in enumerate(ranks_N) for place in range(ranks)
    ]
    return sorted(loads, reverse=True)


@given(held_units())
@settings(deadline=None)
def test_every_unit_goes_to_a_node_that_holds_it(case: tuple[np.ndarray, list[int]]) -> None:
    held_NU, ranks_N = case
    owner_U = balanced_owners(held_NU, ranks_N)
    assert all(held_NU[owner, unit] for unit, owner in enumerate(owner_U))


@given(held_units().filter(lambda case: len(case[1]) ** case[0].shape[1] <= 4096))
@settings(deadline=None)
def test_no_other_choice_of_holders_is_better_balanced(case: tuple[np.ndarray, list[int]]) -> None:
    """The definition: of all choices, the loads, most loaded rank first, are the lowest in dictionary order."""
    held_NU, ranks_N = case
    choices = product(*(np.flatnonzero(column).tolist() for column in held_NU.T))
    best = min(loads_of_ranks(choice, ranks_N) for choice in choices)
    assert loads_of_ranks(balanced_owners(held_NU, ranks_N).tolist(), ranks_N) == best


def test_what_no_node_holds_has_no_owner() -> None:
    held_NU = np.array([[True, False, False], [True, False, True]])
    assert balanced_owners(held_NU, [1, 1]).tolist() == [0, -1, 1]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 60))
@settings(deadline=None)
def test_where_every_node_has_everything_ranks_get_contiguous_equal_runs(ranks_N: list[int], units: int) -> None:
    owner_U = balanced_owners(np.ones((len(ranks_N), units), np.bool_), ranks_N)
    assert owner_U.tolist() == sorted(owner_U.tolist())
    loads = loads_of_ranks(owner_U.tolist(), ranks_N)
    assert sum(loads) == units
    assert max(loads) - min(loads) <= 1


@st.composite
def jobs(draw: st.DrawFn) -> tuple[JobPlan, Holdings]:
    """Ranks on up to 4 nodes in any order, and holdings at random; each unit is somewhere."""
    nodes = draw(st.integers(1, 4))
    node_of_rank = draw(st.permutations([*range(nodes), *draw(st.lists(st.integers(0, nodes - 1), max_size=8))]))
    order = list(dict.fromkeys(node_of_rank))  # nodes count by their lowest rank
    node_of_rank = [order.index(node) for node in node_of_rank]
    layout = draw(st.sampled_from(EXPERT_LAYOUTS))
    held = everything_held(CONFIG, GROUP_SIZE, nodes)
    bits = np.random.Generator(np.random.PCG64(draw(st.integers(0, 1000))))

    def some(held_NU: np.ndarray, keep: bool = False) -> np.ndarray:
        found = held_NU if keep else bits.random(held_NU.shape) < 0.4
        found[bits.integers(0, nodes, held_NU.shape[1]), np.arange(held_NU.shape[1])] = True
        return found

    heads_NH = some(held.heads_NH.copy())
    kv_heads_NG = heads_NH.reshape(nodes, CONFIG.kv_heads, -1).any(axis=2)
    chunks = tuple(some(held_NC.copy(), layout == "shared") for held_NC in held.chunks_NC)
    held = Holdings(heads_NH, kv_heads_NG, some(held.vocabulary_NB.copy()), chunks)
    return plan_job(CONFIG, GROUP_SIZE, layout, node_of_rank=node_of_rank, holdings=held), held


@given(jobs())
@settings(deadline=None)
def test_every_unit_of_a_job_is_computed_once_by_a_rank_whose_node_holds_it(case: tuple[JobPlan, Holdings]) -> None:
    job, held = case
    assert sorted(chain(*(plan.heads for plan in job.plans))) == list(range(CONFIG.heads))
    assert sorted(chain(*(plan.vocabulary_blocks for plan in job.plans))) == list(range(8))
    assert sum(plan.vocabulary_rows for plan in job.plans) == CONFIG.vocabulary
    for rank, plan in enumerate(job.plans):
        assert (plan.rank, plan.ranks, plan.node) == (rank, len(job.plans), job.node_of_rank[rank])
        assert held.heads_NH[plan.node, list(plan.heads)].all()
        assert held.vocabulary_NB[plan.node, list(plan.vocabulary_blocks)].all()
        assert plan.kv_heads == tuple(sorted({head // CONFIG.heads_per_kv_head for head in plan.heads}))
        for units in (plan.heads, plan.vocabulary_blocks, *map(plan.readable_chunks, range(CONFIG.layers))):
            assert list(units) == sorted(units)
    for layer, held_NC in enumerate(held.chunks_NC):
        assert job.holds(layer) is held_NC
        owned = [plan.owned_chunks(layer) for plan in job.plans]
        if job.layout == "shared":
            assert owned == [None] * job.ranks
            continue
        assert sorted(np.concatenate(owned).tolist()) == list(range(held_NC.shape[1]))
        assert all(held_NC[job.node_of_rank[rank], own].all() for rank, own in enumerate(owned))


@given(jobs())
@settings(deadline=None)
def test_the_ranks_of_a_node_share_its_units_evenly(case: tuple[JobPlan, Holdings]) -> None:
    job, _ = case
    for node in range(job.nodes):
        plans = job.of_node(node)
        assert [plan.local_rank for plan in plans] == list(range(len(plans)))
        assert {plan.local_ranks for plan in plans} == {len(plans)}
        for counts in ([len(plan.heads) for plan in plans], [len(plan.vocabulary_blocks) for plan in plans]):
            assert max(counts) - min(counts) <= 1


@given(jobs())
@settings(deadline=None)
def test_what_ranks_send_to_rank_0_is_put_in_order(case: tuple[JobPlan, Holdings]) -> None:
    job, _ = case
    sent = list(chain(*job.kv_senders()))
    assert sorted(sent) == list(range(CONFIG.kv_heads))
    assert all(set(own) <= set(plan.kv_heads) for own, plan in zip(job.kv_senders(), job.plans, strict=True))
    assert [sent[place] for place in in_order(sent)] == list(range(CONFIG.kv_heads))
    ids = [
        row
        for plan in job.plans
        for block in plan.vocabulary_blocks
        for row in range(128 * block, min(128 * block + 128, CONFIG.vocabulary))
    ]
    columns = job.vocabulary_columns()
    assert (ids if columns is None else [ids[column] for column in columns]) == list(range(CONFIG.vocabulary))


@pytest.mark.parametrize("node_of_rank", [[0], [0, 0, 0], [0, 1, 2], [0, 0, 1], [0, 1, 1, 2]])
def test_whoever_has_everything_divides_experts_as_one_node_does(node_of_rank: list[int]) -> None:
    ranks = len(node_of_rank)
    for layout, split in (("whole", whole_chunks), ("sliced", sliced_chunks)):
        job = plan_job(CONFIG, GROUP_SIZE, layout, node_of_rank=node_of_rank)
        for rank, layer in product(range(ranks), range(CONFIG.layers)):
            experts = CONFIG.layer_experts(layer)
            chunks = job.holds(layer).shape[1] // experts
            assert job.plans[rank].owned_chunks(layer).tolist() == list(split(experts, chunks, ranks, rank))


def test_an_expert_that_no_node_has_whole_is_divided_by_chunks() -> None:
    held = everything_held(CONFIG, GROUP_SIZE, 2)
    chunks_NC = [held_NC.copy() for held_NC in held.chunks_NC]
    chunks_NC[0][0, 0] = chunks_NC[0][1, 1] = False  # expert 0 has two chunks of 128 hidden units
    job = plan_job(CONFIG, GROUP_SIZE, "whole", node_of_rank=[0, 1], holdings=replace(held, chunks_NC=tuple(chunks_NC)))
    first, second = (set(plan.owned_chunks(0).tolist()) for plan in job.plans)
    assert 1 in first
    assert 0 in second
    assert len(first) == len(second) == 5


def held_by_shards(config: ModelConfig, shards_of_node: Sequence[Sequence[int]]) -> Holdings:
    """As whole stores of SHARDS shards are cut."""
    held = everything_held(config, GROUP_SIZE, len(shards_of_node))

    def of(units: int) -> np.ndarray:
        return np.array([[any(unit in contiguous(units, SHARDS, s) for s in own) for unit in range(units)]
                         for own in shards_of_node])  # fmt: skip

    experts = config.experts
    chunks = held.chunks_NC[0].shape[1] // experts
    return Holdings(
        of(config.heads),
        np.ones((len(shards_of_node), config.kv_heads), np.bool_),
        of(held.vocabulary_NB.shape[1]),
        tuple(np.repeat(of(experts), chunks, axis=1) for _ in range(config.layers)),
    )


@pytest.mark.parametrize(
    ("shards_of_node", "node_of_rank", "heads"),
    [
        ([[0, 2], [1, 3]], [0, 1], ["0 1 2 6 7 8", "3 4 5 9 10 11"]),
        ([[0, 1, 2], [3]], [0, 1], ["0 1 2 3 4 5 6 7 8", "9 10 11"]),
        ([[0, 1, 2], [3]], [0, 1, 0], ["0 1 2 3 4", "9 10 11", "5 6 7 8"]),
        ([[0, 1], [1, 2, 3]], [0, 1, 1], ["0 1 2 3", "4 5 6 7", "8 9 10 11"]),
        ([[0], [1, 2, 3]], [0, 0, 0, 0, 1], ["0", "1", "2", "", "3 4 5 6 7 8 9 10 11"]),
    ],
)
def test_heads_of_some_jobs(shards_of_node: list[list[int]], node_of_rank: list[int], heads: list[str]) -> None:
    config = model(layers=1, dense_layers=(), heads=12, kv_heads=3, vocabulary=900)
    job = plan_job(
        config, GROUP_SIZE, "whole", node_of_rank=node_of_rank, holdings=held_by_shards(config, shards_of_node)
    )
    assert [" ".join(map(str, plan.heads)) for plan in job.plans] == heads
