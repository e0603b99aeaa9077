"""Which chunks of the experts that got tokens a rank computes: its own ones, or its run of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import pytest

from dist_moe.kernels import ChunkFormat, Kernels, MatrixFormat, Picks, WeightFormat, Workers, chunk_bytes
from dist_moe.parallel.plan import CHUNK_READ_COST_TOKENS as READ_COST
from helpers.weightless import Q4, weightless_layer

Int64s = npt.NDArray[np.int64]


F32 = ChunkFormat(MatrixFormat(WeightFormat.F32, 0), MatrixFormat(WeightFormat.F32, 0))


def picked(
    tokens_E: Int64s,
    chunks_per_expert: int,
    rank: int,
    ranks: int,
    owned: Int64s | None = None,
    formats: Sequence[ChunkFormat] = (Q4,),
) -> list[int]:
    """Numbers of the chunks that C picks; a chunk's address is its number times 64. Checks each one's entries."""
    experts = len(tokens_E)
    layer = weightless_layer(experts, experts * chunks_per_expert, owned, formats=formats)
    offset_E1 = np.concatenate([[0], np.cumsum(tokens_E)]).astype(np.int32)
    workers = Workers(node=0, rank=rank, ranks=ranks, read_cost=READ_COST)
    words = Kernels.pick_chunks(Picks(1, experts), layer, offset_E1, workers).astype(np.int64)
    numbers = words[:, 0] // 64
    expert = numbers // chunks_per_expert
    assert (words[:, 2] == offset_E1[expert]).all()
    assert (words[:, 3] == tokens_E[expert]).all()
    return numbers.tolist()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_chunk_counts_by_its_bytes_where_formats_differ(ranks: int) -> None:
    """Reading is most of the work on a token: ranks read equally much, to one chunk."""
    formats = [F32, F32, F32, Q4, Q4, Q4, Q4]
    runs = [picked(np.ones(7, np.int64), 10, rank, ranks, formats=formats) for rank in range(ranks)]
    assert sorted(chain(*runs)) == list(range(70))
    read = [sum(chunk_bytes(formats[number // 10], 32, 32) for number in run) for run in runs]
    assert max(read) - min(read) <= 2 * chunk_bytes(F32, 32, 32)
    alike = [picked(np.ones(7, np.int64), 10, rank, ranks) for rank in range(ranks)]
    assert max(map(len, alike)) - min(map(len, alike)) <= 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_shared_runs_tile_the_chunks_that_got_tokens(ranks: int) -> None:
    tokens_E = np.array([0, 3, 0, 1, 1, 40, 0, 2])
    runs = [picked(tokens_E, 6, rank, ranks) for rank in range(ranks)]
    assert list(chain(*runs)) == [e * 6 + c for e in (1, 3, 4, 5, 7) for c in range(6)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_a_shared_chunk_belongs_to_the_run_with_the_middle_of_its_work(ranks: int) -> None:
    tokens_E = np.random.default_rng(3).integers(0, 20, 128) * (np.arange(128) % 3 == 0)
    work = np.repeat(np.where(tokens_E > 0, tokens_E + READ_COST, 0), 4)
    middle = np.cumsum(work) - work / 2
    run = np.floor(middle * ranks / work.sum()).astype(int)
    for rank in range(ranks):
        assert picked(tokens_E, 4, rank, ranks) == np.flatnonzero((work > 0) & (run == rank)).tolist()


def test_shared_runs_have_equal_work() -> None:
    tokens_E = np.zeros(128, dtype=np.int64)
    tokens_E[[3, 17, 40, 41, 77, 90, 101, 127]] = 1
    assert [len(picked(tokens_E, 6, rank, 4)) for rank in range(4)] == [12, 12, 12, 12]
    heavy_E = np.array([100, 1, 1])
    work = [sum(int(heavy_E[n // 2]) + READ_COST for n in picked(heavy_E, 2, rank, 2)) for rank in (0, 1)]
    assert work == [108, 144]


def test_own_chunks_without_tokens_are_left_out() -> None:
    owned = np.array([0, 3, 4, 9, 11])
    assert picked(np.array([5, 0, 1, 0, 0, 2]), 2, 1, 3, owned) == [0, 4, 11]
