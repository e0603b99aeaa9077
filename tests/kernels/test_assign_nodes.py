"""Which node computes which chunks of a step: all of it once, by a node that holds it, as evenly as that allows."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.kernels import (
    LARGEST_SPEED,
    ChunkHolders,
    ExpertsLayer,
    Kernels,
    Picks,
    Workers,
)
from dist_moe.parallel.expert_plan import chunk_runs
from dist_moe.parallel.plan import CHUNK_READ_COST_TOKENS as READ_COST
from helpers.node_assignment import FEW_TOKENS, assign
from helpers.weightless import weightless_layer

Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]


def layer_of(held_NC: Bools, experts: int, owned: Int64s | None = None) -> tuple[ExpertsLayer, Picks]:
    """A layer without weights, and what its steps pick."""
    nodes, chunks = held_NC.shape
    runs = chunk_runs(held_NC, experts)
    holders = ChunkHolders(runs.runs_R5, runs.node_H, nodes)
    return weightless_layer(experts, chunks, owned, holders), Picks(nodes, experts, [holders])


def offsets(tokens_E: Int64s) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(tokens_E)]).astype(np.int32)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Bools, int, Int64s, tuple[int, ...]]:
    """Held chunks [N, C], experts, tokens of each, speeds: whole experts or single chunks, some held by nobody."""
    nodes, experts, chunks = draw(st.integers(2, 6)), draw(st.integers(1, 12)), draw(st.integers(1, 6))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.3, 0.5, 0.8, 1.0]))
    by_expert = draw(st.booleans())
    shape = (nodes, experts if by_expert else experts * chunks)
    held = generator.random(shape) < share
    held[generator.integers(0, nodes, shape[1]), np.arange(shape[1])] |= draw(st.booleans())
    held_NC = np.repeat(held, chunks, axis=1) if by_expert else held
    most = draw(st.sampled_from([1, 2, 40, 400]))
    tokens_E = generator.integers(0, most + 1, experts)
    speeds = draw(st.lists(st.integers(1, 4), min_size=nodes, max_size=nodes))
    return held_NC, experts, tokens_E, tuple(speeds)


@settings(max_examples=300, deadline=None)
@given(situations(), st.booleans())
def test_c_decides_as_the_definition_does(situation: tuple[Bools, int, Int64s, tuple[int, ...]], keep: bool) -> None:
    held_NC, experts, tokens_E, speeds = situation
    layer, picks = layer_of(held_NC, experts)
    offset_E1 = offsets(tokens_E)
    parts = Kernels.assign_nodes(picks, layer, offset_E1, Workers(0, 0, 1, READ_COST, speeds), keep)
    expected = assign(chunk_runs(held_NC, experts), offset_E1.tolist(), speeds, READ_COST, keep)
    assert [tuple(part) for part in parts.tolist()] == expected


@settings(max_examples=200, deadline=None)
@given(situations(), st.booleans())
def test_every_chunk_meets_each_of_its_tokens_on_one_node_that_holds_it(
    situation: tuple[Bools, int, Int64s, tuple[int, ...]], keep: bool
) -> None:
    held_NC, experts, tokens_E, speeds = situation
    layer, picks = layer_of(held_NC, experts)
    offset_E1, per_expert = offsets(tokens_E), held_NC.shape[1] // experts
    met = np.zeros((held_NC.shape[1], int(offset_E1[-1])), np.int64)
    parts = Kernels.assign_nodes(picks, layer, offset_E1, Workers(0, 0, 1, READ_COST, speeds), keep).tolist()
    for expert, node, first_chunk, chunks, first, count in parts:
        numbers = slice(expert * per_expert + first_chunk, expert * per_expert + first_chunk + chunks)
        assert held_NC[node, numbers].all()
        assert offset_E1[expert] <= first < first + count <= offset_E1[expert + 1]
        met[numbers, first : first + count] += 1
    expert_N = np.repeat(np.arange(experts), tokens_E)
    own = np.arange(held_NC.shape[1])[:, np.newaxis] // per_expert == expert_N
    assert (met == (own & held_NC.any(axis=0)[:, np.newaxis])).all()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_ranks_of_all_nodes_share_the_work(ranks: int, keep: bool) -> None:
    generator = np.random.default_rng(ranks)
    held_NC = np.repeat(generator.random((3, 16)) < 0.6, 4, axis=1)
    held_NC[0] |= ~held_NC.any(axis=0)
    tokens_E = generator.integers(0, 3, 16) * generator.integers(1, 90, 16)
    layer, picks = layer_of(held_NC, 16)
    found = []
    for node in range(3):
        for rank in range(ranks):
            workers = Workers(node, rank, ranks, READ_COST, (1, 1, 1))
            if keep:
                Kernels.assign_nodes(picks, layer, offsets(tokens_E), workers, True)
            words = Kernels.pick_chunks(picks, layer, offsets(tokens_E), workers).astype(np.int64)
            found += [(number // 64, entry) for number, _format, first, n in words for entry in range(first, first + n)]
    expert_N = np.repeat(np.arange(16), tokens_E)
    assert sorted(found) == sorted((int(e) * 4 + c, n) for n, e in enumerate(expert_N) for c in range(4))


def test_with_own_chunks_a_rank_takes_those_of_its_nodes_parts() -> None:
    held_NC = np.ones((2, 8), np.bool_)
    own = [np.array([0, 1, 4, 5]), np.array([2, 3, 6, 7])]
    tokens_E = np.array([3, 1])
    found = []
    for node in range(2):
        for rank, owned in enumerate(own):
            layer, picks = layer_of(held_NC, 2, owned)
            words = Kernels.pick_chunks(picks, layer, offsets(tokens_E), Workers(node, rank, 2, READ_COST, (1, 1)))
            numbers = (words[:, 0] // 64).tolist()
            assert set(numbers) <= set(owned.tolist())
            found += numbers
    assert sorted(found) == list(range(8))


@settings(max_examples=100, deadline=None)
@given(situations())
def test_with_equal_work_per_chunk_no_other_choice_has_a_less_busy_busiest_node(
    situation: tuple[Bools, int, Int64s, tuple[int, ...]],
) -> None:
    held_NC, experts, tokens_E, _ = situation
    tokens_E = np.minimum(tokens_E, 1)
    layer, picks = layer_of(held_NC, experts)
    nodes, per_expert = len(held_NC), held_NC.shape[1] // experts
    workers = Workers(0, 0, 1, READ_COST, (1,) * nodes)
    chunks_N = np.zeros(nodes, np.int64)
    for part in Kernels.assign_nodes(picks, layer, offsets(tokens_E), workers):
        chunks_N[part[1]] += part[3]
    held_by = held_NC[:, np.repeat(tokens_E > 0, per_expert) & held_NC.any(axis=0)]
    # What only nodes of a group hold is theirs to do: the fullest group bounds every choice, and the bound is met.
    bounds = [0]
    for size in range(1, nodes + 1):
        for group in combinations(range(nodes), size):
            others = [node for node in range(nodes) if node not in group]
            bounds.append(-(-int((~held_by[others].any(axis=0)).sum()) // size))
    assert chunks_N.max(initial=0) == max(bounds)


def test_an_expert_of_many_tokens_is_split_between_its_holders_and_one_of_few_is_not() -> None:
    held_NC = np.ones((2, 6), np.bool_)
    workers = Workers(0, 0, 1, READ_COST, (1, 1))
    layer, picks = layer_of(held_NC, 1)
    few = np.array([FEW_TOKENS * READ_COST])
    assert Kernels.assign_nodes(picks, layer, offsets(few), workers, True).tolist() == [[0, 0, 0, 6, 0, 32]]
    parts = Kernels.assign_nodes(picks, layer, offsets(few * 4), workers, True).tolist()
    assert parts == [[0, 0, 0, 6, 0, 64], [0, 1, 0, 6, 64, 64]]
    assert [part[3] for part in Kernels.assign_nodes(picks, layer, offsets(few * 4), workers).tolist()] == [3, 3]


def test_a_node_works_in_proportion_to_its_speed() -> None:
    held_NC = np.ones((3, 60), np.bool_)
    layer, picks = layer_of(held_NC, 10)
    workers = Workers(0, 0, 1, READ_COST, (3, 2, 1))
    work = np.zeros(3, np.int64)
    for part in Kernels.assign_nodes(picks, layer, offsets(np.ones(10, np.int64)), workers):
        work[part[1]] += part[3]
    assert work.tolist() == [30, 20, 10]


@pytest.mark.parametrize("speeds", [(), (0,), (1, LARGEST_SPEED + 1)])
def test_speeds_out_of_range_are_refused(speeds: tuple[int, ...]) -> None:
    with pytest.raises(TypeError, match=r"speeds|node 0 of 0"):
        Workers(0, 0, 1, READ_COST, speeds)


def test_a_layer_that_the_picks_have_no_room_for_is_refused() -> None:
    layer, _ = layer_of(np.ones((2, 6), np.bool_), 1)
    with pytest.raises(TypeError, match="does not fit"):
        Kernels.assign_nodes(Picks(2, 1), layer, offsets(np.array([1])), Workers(0, 0, 1, READ_COST, (1, 1)))
