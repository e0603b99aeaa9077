"""The world and its exchanges on the ranks that mpirun started; `test_ranks_at_every_size.py` runs these for several n.

T tokens · D model dim · N columns of all ranks · n columns of one rank · W ranks
"""

from __future__ import annotations

import time

import numpy as np
import pytest

import dist_moe.parallel.exchange as exchange_module
from dist_moe.errors import StoreError, UsageError
from dist_moe.parallel.exchange import HEADER_WORDS, Exchange
from dist_moe.parallel.ledger import Kind
from dist_moe.parallel.node_exchange import NodeExchange
from dist_moe.parallel.world import AgreedError, World

pytestmark = pytest.mark.mpi


def contribution(rank: int, T: int, D: int) -> np.ndarray:
    """Sums near the contract's bound (2^51), of both signs."""
    return np.random.default_rng(rank).integers(-(2**51), 2**51, (T, D))


def test_every_rank_knows_where_all_ranks_are(world: World) -> None:
    assert len(world.hosts) == len(world.node_of_rank) == world.size
    assert world.hostname == world.hosts[world.rank]
    assert world.is_leader == (world.rank == 0)
    assert world.node_of_rank[0] == 0
    # The tests' ranks all share this machine.
    assert (world.nodes, world.node, world.local_rank, world.local_size) == (1, 0, world.rank, world.size)


@pytest.mark.parametrize(("T", "D"), [(1, 1), (1, 33), (3, 31), (7, 2048)])
def test_sum_exact_equals_the_sum_of_all_ranks(world: World, exchange: Exchange, T: int, D: int) -> None:
    sums_TD = contribution(world.rank, T, D)
    exchange.sum_exact(sums_TD)
    assert (sums_TD == sum(contribution(rank, T, D) for rank in range(world.size))).all()


def test_long_arrays_travel_in_pieces(world: World, exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "PIECE_ELEMENTS", 5)
    sums = contribution(world.rank, 1, 13)
    exchange.sum_exact(sums)
    assert (sums == sum(contribution(rank, 1, 13) for rank in range(world.size))).all()
    payload = np.full(13, world.rank, np.int32)
    exchange.broadcast(payload)
    assert (payload == 0).all()
    gather_columns_and_check(world, exchange, rows=7)


def test_an_empty_sum_is_no_message(exchange: Exchange) -> None:
    exchange.sum_exact(np.empty((0, 4), np.int64))


def test_the_lowest_fault_wins(world: World, exchange: Exchange) -> None:
    fault_T = np.array([1000 - world.rank, 7, 2**31 - 1], np.int32)
    if world.rank == world.size - 1:
        fault_T[2] = 3
    exchange.min_faults(fault_T)
    assert fault_T.tolist() == [1000 - world.size + 1, 7, 3]


def test_followers_wait_for_the_header_and_sleep(world: World, exchange: Exchange) -> None:
    header = np.arange(HEADER_WORDS) if world.is_leader else np.full(HEADER_WORDS, -1, np.int64)
    for step in range(3):
        world.barrier()
        cpu_s = time.process_time()
        if world.is_leader:
            time.sleep(0.3)
            header[0] = step
            exchange.post_step(header)
        else:
            exchange.wait_step(header)
            assert time.process_time() - cpu_s < 0.1
        assert header.tolist() == [step, *range(1, HEADER_WORDS)]


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint8, np.float64])
def test_broadcast_gives_the_leaders_array(world: World, exchange: Exchange, dtype: type[np.generic]) -> None:
    array = (np.arange(33) + 100 * world.rank).astype(dtype).reshape(3, 11)
    exchange.broadcast(array)
    assert (array == np.arange(33).astype(dtype).reshape(3, 11)).all()


def gather_columns_and_check(world: World, exchange: Exchange, rows: int) -> None:
    counts_W = [(3 * rank + 2) % 7 for rank in range(world.size)]  # rank 4 has none
    first = sum(counts_W[: world.rank])
    whole_TN = np.random.default_rng(5).normal(size=(rows, sum(counts_W))).astype(np.float32)
    local_Tn = np.ascontiguousarray(whole_TN[:, first : first + counts_W[world.rank]])
    out_TN = np.full_like(whole_TN, np.nan) if world.is_leader else None
    full_TN = exchange.gather_columns(local_Tn, counts_W, out_TN)
    assert (full_TN is None) == (not world.is_leader)
    assert full_TN is None or (full_TN == whole_TN).all()


@pytest.mark.parametrize("rows", [1, 2, 31])
def test_columns_stand_in_rank_order(world: World, exchange: Exchange, rows: int) -> None:
    gather_columns_and_check(world, exchange, rows)


def test_equal_arrays_are_stacked_on_the_leader(world: World, exchange: Exchange) -> None:
    stacked = exchange.gather_equal(np.array([[world.rank, 0.5]]))
    assert (stacked is None) == (not world.is_leader)
    assert stacked is None or stacked.tolist() == [[[rank, 0.5]] for rank in range(world.size)]


def test_the_ledger_counts_what_was_sent(world: World, exchange: Exchange) -> None:
    exchange.sum_exact(np.zeros(100, np.int64))
    notes = exchange.ledger.take()
    if world.size == 1:
        assert len(notes.kind_n) == 0
        return
    assert notes.kind_n.tolist() == [Kind.SUMS]
    assert notes.begin_n < notes.end_n
    # Through shared memory each rank writes its array once; by MPI the model is reduce-scatter and allgather.
    shared = isinstance(exchange, NodeExchange)
    partners = exchange.world.nodes if shared else world.size
    by_mpi = 2 * (partners - 1) * 800 // partners if not shared or exchange.world.local_rank == 0 else 0
    if exchange.hosts is None:
        assert notes.wire_n.tolist() == [by_mpi]
    else:  # zeros are packed, without loss
        assert 0 < notes.wire_n[0] < by_mpi
    assert notes.shared_n.tolist() == [800 if shared else 0]
    assert exchange.ledger.count == 0


def test_all_ranks_note_the_same_exchanges(world: World, exchange: Exchange) -> None:
    exchange.sum_exact(np.zeros((3, 5), np.int64))
    exchange.broadcast(np.zeros(3))
    exchange.min_faults(np.zeros(3, np.int32))
    gather_columns_and_check(world, exchange, rows=3)
    exchange.gather_equal(np.zeros(3))
    header = np.zeros(HEADER_WORDS, np.int64)
    if world.is_leader:
        exchange.post_step(header)
    else:
        exchange.wait_step(header)
    kinds = [Kind.SUMS, Kind.BROADCAST, Kind.FAULTS, Kind.GATHER, Kind.GATHER, Kind.HEADER]
    assert exchange.ledger.take().kind_n.tolist() == (kinds if world.size > 1 else [])


def test_no_error_is_agreed_quietly(world: World) -> None:
    world.agree(None, "testing")


def test_an_error_of_all_ranks_is_one_line(world: World) -> None:
    with pytest.raises(AgreedError) as caught:
        world.agree(UsageError("no such store"), "testing")
    assert (caught.value.lines, caught.value.exit_code) == (("no such store",), 2)


def test_an_error_of_the_last_rank_reaches_all(world: World) -> None:
    last = world.size - 1

    def open_store() -> None:
        with world.together("opening the store"):
            if world.rank == last:
                raise StoreError("shard-00002 is missing: copy it")

    with pytest.raises(AgreedError) as caught:
        open_store()
    place = f"rank {last} on {world.hosts[last]}, opening the store: " if world.size > 1 else ""
    assert caught.value.lines == (place + "shard-00002 is missing: copy it",)


def test_the_highest_code_counts_and_texts_may_be_long(world: World) -> None:
    error = UsageError("ä" * 3000 * (world.rank + 1))
    error.exit_code = 2 + world.rank
    with pytest.raises(AgreedError) as caught:
        world.agree(error, "testing")
    assert caught.value.exit_code == 2 + world.size - 1
    assert [line.count("ä") for line in caught.value.lines] == [3000 * (rank + 1) for rank in range(world.size)]
