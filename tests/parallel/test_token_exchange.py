"""The exchanges of tokens on the ranks that mpirun started, against their definitions.

T tokens · D model dim · K experts per token
"""

from __future__ import annotations

import numpy as np
import pytest

import dist_moe.parallel.token_exchange as token_exchange
from dist_moe.kernels import RoutingRows, SumRows
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.token_exchange import TokenExchange
from dist_moe.parallel.token_owners import Owners, RowNumbers
from dist_moe.parallel.world import World

pytestmark = pytest.mark.mpi
SIZES = [1, 2, 7, 64]


@pytest.fixture(params=["whole messages", "pieces"])
def tokens(exchange: Exchange, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TokenExchange:
    """Over all ranks, by each kind of exchange; long messages in pieces of some rows each."""
    if request.param == "pieces":
        monkeypatch.setattr(token_exchange, "FEWEST_BYTES", 1000)
        monkeypatch.setattr(token_exchange, "MOST_BYTES", 1000)
    return TokenExchange(exchange)


def sums_of(rank: int, T: int, D: int = 40) -> np.ndarray:
    return np.random.default_rng([rank, T]).integers(-(2**51), 2**51, (T, D))


def wanted_by(owners: Owners) -> list[RowNumbers]:
    """Some tokens for each group, none for one of them."""
    groups = len(owners.groups)
    return [
        np.array([t for t in range(owners.count) if group % 3 != 1 and (t * 7 + group) % 3], np.int32)
        for group in range(groups)
    ]


def routing(T: int, rows: list[int] | range) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights of which only some rows are known."""
    ids_TK = np.full((T, 3), -1, np.int32)
    weights_TK = np.full((T, 3), -1, np.float32)
    ids_TK[rows] = np.arange(3 * T).reshape(T, 3)[rows]
    weights_TK[rows] = ids_TK[rows] / 7
    return ids_TK, weights_TK


@pytest.mark.parametrize("T", SIZES)
def test_gather_gives_every_row_to_all(tokens: TokenExchange, T: int) -> None:
    owners = tokens.owners(T)
    ids_TK, weights_TK = routing(T, list(owners.own))
    tokens.gather(RoutingRows(ids_TK, weights_TK), owners)
    expected_ids_TK, expected_weights_TK = routing(T, range(T))
    assert (ids_TK == expected_ids_TK).all()
    assert (weights_TK == expected_weights_TK).all()


@pytest.mark.parametrize("T", SIZES)
def test_dispatch_gives_each_group_what_it_wants(tokens: TokenExchange, T: int) -> None:
    owners = tokens.owners(T)
    wanted = wanted_by(owners)
    ids_TK, weights_TK = routing(T, list(owners.own))
    tokens.dispatch(RoutingRows(ids_TK, weights_TK), owners, wanted)
    mine = wanted[owners.group]
    assert (ids_TK[mine] == routing(T, range(T))[0][mine]).all()


@pytest.mark.parametrize("T", SIZES)
def test_reduce_scatter_adds_up_all_ranks(world: World, tokens: TokenExchange, T: int) -> None:
    owners = tokens.owners(T)
    sums_TD = sums_of(world.rank, T)
    tokens.reduce_scatter(sums_TD, SumRows(sums_TD), owners)
    expected_TD = sum(sums_of(rank, T) for rank in range(world.size))
    assert (sums_TD[owners.own] == expected_TD[owners.own]).all()


@pytest.mark.parametrize("T", SIZES)
def test_give_back_adds_up_the_groups_that_worked(world: World, tokens: TokenExchange, T: int) -> None:
    owners = tokens.owners(T)
    wanted = wanted_by(owners)

    def worked(group: int) -> np.ndarray:
        sums_TD = np.zeros((T, 40), np.int64)
        sums_TD[wanted[group]] = sums_of(group, T)[wanted[group]]
        return sums_TD

    # The first member of a group did all of its work.
    first = tokens.world.local_rank == 0 or len(owners.members) == 1
    sums_TD = worked(owners.group) if first else np.zeros((T, 40), np.int64)
    tokens.give_back(sums_TD, SumRows(sums_TD), owners, wanted)
    expected_TD = sum(worked(group) for group in range(len(owners.groups)))
    assert (sums_TD[owners.own] == expected_TD[owners.own]).all()
