"""Every unit has exactly one owner, whatever the rank count; pure functions, no MPI."""

from __future__ import annotations

from itertools import chain

import pytest

from dist_moe import split
from dist_moe.kernels import VOCABULARY_BLOCK
from dist_moe.parallel.plan import Plan, plan_job
from dist_moe.split import contiguous, head_range_kv_heads, sliced_chunks, whole_chunks
from helpers.models import model


def plans(ranks: int, *, vocabulary: int = 1000, layout: str = "whole") -> list[Plan]:
    config = model(heads=32, kv_heads=4, vocabulary=vocabulary)
    return list(plan_job(config, 32, layout, node_of_rank=[0] * ranks).plans)


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7, 8, 31])
@pytest.mark.parametrize("total", [0, 1, 7, 32, 128])
def test_contiguous_tiles_the_range_in_order(total: int, parts: int) -> None:
    runs = [contiguous(total, parts, index) for index in range(parts)]
    assert list(chain(*runs)) == list(range(total))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 8, 200])
@pytest.mark.parametrize(("experts", "chunks"), [(1, 5), (128, 6), (16, 1), (5, 3)])
@pytest.mark.parametrize("split", [whole_chunks, sliced_chunks])
def test_every_chunk_has_one_owner(split, experts: int, chunks: int, parts: int) -> None:
    owned = list(chain(*(split(experts, chunks, parts, index) for index in range(parts))))
    assert sorted(owned) == list(range(experts * chunks))


def test_whole_keeps_experts_together_but_deals_out_a_dense_mlp() -> None:
    assert whole_chunks(8, 6, 4, 1) == range(12, 24)
    assert whole_chunks(1, 6, 4, 0) == range(2)


def test_kv_heads_cover_the_head_range() -> None:
    assert head_range_kv_heads(range(7, 14), 8) == range(0, 2)
    assert head_range_kv_heads(range(8, 16), 8) == range(1, 2)
    assert head_range_kv_heads(range(3, 3), 8) == range(0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 7, 8, 32, 40])
def test_heads_and_vocabulary_have_one_owner_each(ranks: int) -> None:
    all_plans = plans(ranks)
    assert list(chain(*(plan.heads for plan in all_plans))) == list(range(32))
    assert list(chain(*(plan.vocabulary_blocks for plan in all_plans))) == list(range(8))
    assert sum(plan.vocabulary_rows for plan in all_plans) == 1000
    for rank, plan in enumerate(all_plans):
        assert plan.heads == tuple(contiguous(32, ranks, rank))
        assert plan.vocabulary_blocks == tuple(contiguous(8, ranks, rank))
        assert {head // 8 for head in plan.heads} == set(plan.kv_heads)


def test_a_rank_may_own_no_vocabulary() -> None:
    assert [plan.vocabulary_rows for plan in plans(4, vocabulary=130)] == [128, 2, 0, 0]


def test_ranks_beyond_the_heads_own_none() -> None:
    assert [len(plan.heads) for plan in plans(35)] == [1] * 32 + [0] * 3
    assert plans(35)[34].kv_heads == ()


def test_the_block_of_the_split_is_the_block_of_the_kernels() -> None:
    assert split.VOCABULARY_BLOCK == VOCABULARY_BLOCK
