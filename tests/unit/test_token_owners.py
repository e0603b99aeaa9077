"""Who keeps which tokens: every token has one owner, runs are contiguous, and ranks agree."""

from __future__ import annotations

import numpy as np
import pytest

from dist_moe.parallel.token_owners import deal_tokens, rows_within

GROUPINGS = {
    "one rank": [(0,)],
    "one host": [(0, 1, 2)],
    "a rank per host": [(0,), (1,), (2,)],
    "unequal hosts": [(0, 2, 3), (1,), (4, 5)],
}


@pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 6, 7, 512])
def test_every_token_has_one_owner(groups: list[tuple[int, ...]], tokens: int) -> None:
    in_order = [rank for members in groups for rank in members]
    owners = {rank: deal_tokens(tokens, groups, rank) for rank in in_order}
    assert [token for rank in in_order for token in owners[rank].own] == list(range(tokens))
    lengths = [len(owners[rank].own) for rank in in_order]
    assert max(lengths) - min(lengths) <= 1
    for number, members in enumerate(groups):
        for place, rank in enumerate(members):
            view = owners[rank]
            assert (view.count, view.group) == (tokens, number)
            assert view.members[place] == view.own
            assert [token for run in view.members for token in run] == list(view.of_group)
            assert view.groups == owners[in_order[0]].groups


@pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
def test_of_chosen_tokens_the_owner_stays_the_same(groups: list[tuple[int, ...]]) -> None:
    chosen = [0, 3, 4, 9, 10, 18]
    for members in groups:
        for rank in members:
            all_tokens = deal_tokens(19, groups, rank)
            some = all_tokens.among(chosen)
            assert [chosen[place] for place in some.own] == [token for token in chosen if token in all_tokens.own]
            assert [chosen[place] for place in some.of_group] == [t for t in chosen if t in all_tokens.of_group]
            assert some.count == len(chosen)
            assert sum(len(run) for run in some.members) == len(some.of_group)


def test_rows_within_a_run() -> None:
    row_N = np.array([1, 4, 5, 8], np.int32)
    assert rows_within(row_N, range(4, 8)).tolist() == [4, 5]
    assert rows_within(row_N, range(6, 6)).tolist() == []
    assert deal_tokens(7, [(0,), (1,)], 0).numbers(range(3, 6)).tolist() == [3, 4, 5]
