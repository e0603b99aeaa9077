"""How unevenly experts fall on nodes: small cases counted by hand, and the design's table for 8 of 128 experts."""

from __future__ import annotations

from itertools import combinations

import pytest

from dist_moe.engine.planning.straggling import busiest_share, busiest_tokens, distinct_experts, expected_maximum


def test_two_of_four_experts_on_two_nodes() -> None:
    # Of the 6 pairs 2 lie on one node (2 experts there), 4 on both (1 each): 8 / 6.
    assert expected_maximum((2, 2), 2) == pytest.approx(8 / 6)


@pytest.mark.parametrize(("sizes", "drawn"), [((3, 2), 2), ((2, 2, 1), 3), ((3, 3, 2), 4)])
def test_the_mean_over_all_draws(sizes: tuple[int, ...], drawn: int) -> None:
    owner = [part for part, size in enumerate(sizes) for _ in range(size)]
    most = [
        max([owner[item] for item in draw].count(part) for part in range(len(sizes)))
        for draw in combinations(range(len(owner)), drawn)
    ]
    assert expected_maximum(sizes, drawn) == pytest.approx(sum(most) / len(most))


@pytest.mark.parametrize(("nodes", "most"), [(2, 5.06), (4, 3.49), (8, 2.53), (16, 1.98)])
def test_one_token_of_the_30b(nodes: int, most: float) -> None:
    assert 8 * busiest_share("whole", 128, 6, nodes, 8) == pytest.approx(most, abs=0.005)


def test_layouts_that_are_even() -> None:
    assert busiest_share("sliced", 128, 6, 3, 8) == 1 / 3  # 6 chunks of each expert on 3 nodes
    assert busiest_share("shared", 128, 6, 4, 8) == 1 / 4
    assert busiest_share("whole", 128, 6, 1, 8) == 1.0
    assert busiest_share("whole", 1, 6, 4, 1) == 2 / 6  # a dense MLP: 2 + 2 + 1 + 1 chunks


def test_slices_are_between_even_and_whole() -> None:
    sliced, whole = busiest_share("sliced", 128, 6, 4, 8), busiest_share("whole", 128, 6, 4, 8)
    assert 1 / 4 < sliced < whole


def test_a_fraction_of_an_expert_lies_between() -> None:
    low, high = busiest_share("whole", 8, 1, 2, 2), busiest_share("whole", 8, 1, 2, 3)
    assert busiest_share("whole", 8, 1, 2, 2.5) == pytest.approx((low + high) / 2)


def test_distinct_experts() -> None:
    # Two tokens that pick 1 of 2 experts: 1 with probability 1/2, else 2.
    assert distinct_experts(2, 1, 2) == 1.5
    assert distinct_experts(128, 8, 16) == pytest.approx(82.4, abs=0.05)


def test_many_tokens_are_spread_evenly() -> None:
    few, many = busiest_tokens(128, 8, 4, 16), busiest_tokens(128, 8, 4, 1600)
    assert 1 / 4 < many < few
    assert busiest_tokens(128, 8, 1, 16) == 1.0
    # The mean of the larger of two standard normal variables is 1 / sqrt(pi); 8 picks of one token have the variance
    # 8 x 1/4 x 120 / 127 on a node.
    assert busiest_tokens(128, 8, 2, 1) == pytest.approx(0.5 + 0.5642 * (2 * 120 / 127) ** 0.5 / 8, abs=1e-3)
