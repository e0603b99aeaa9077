"""Collectives through shared memory, among forked processes."""

from __future__ import annotations

import os
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_moe.errors import EnvironmentMismatch
from dist_moe.kernels import NodeMemory

SIZES = (1, 7, 2048, 8191, 32768, 32769, 100_003)


def on_ranks(ranks: int, spins: int, body: Callable[[NodeMemory, int], None]) -> None:
    """Run body(node, rank) in one process per rank; fails if it raises in any."""
    name = f"test-{uuid.uuid4().hex}"
    first = NodeMemory(name, 0, ranks, spins)

    def meet_and_run(node: NodeMemory, rank: int) -> None:
        node.broadcast(np.zeros(1))  # all have opened it
        body(node, rank)

    children = []
    for rank in range(1, ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                meet_and_run(NodeMemory(name, rank, ranks, path=first.path), rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        children.append(child)
    try:
        meet_and_run(first, 0)
    finally:
        first.close_file()
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    first.close()
    assert codes == [0] * (ranks - 1)


def data(rank: int, size: int, kind: type) -> np.ndarray:
    return np.random.default_rng([rank, size]).integers(-(2**31), 2**31 - 1, size).astype(kind)


@pytest.mark.parametrize("spins", [0, 2000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_collectives_of_every_size(ranks: int, spins: int) -> None:
    def body(node: NodeMemory, rank: int) -> None:
        for size in SIZES:
            sums, lowest = data(rank, size, np.int64), data(rank, size, np.int32)
            node.sum(sums)
            node.minimum(lowest)
            assert np.array_equal(sums, np.sum([data(r, size, np.int64) for r in range(ranks)], axis=0))
            assert np.array_equal(lowest, np.min([data(r, size, np.int32) for r in range(ranks)], axis=0))
            sent = data(9, size, np.int64) if rank == 0 else np.zeros(size, np.int64)
            node.broadcast(sent)
            assert np.array_equal(sent, data(9, size, np.int64))
            gathered = node.gather(data(rank, size, np.int32))
            if rank == 0:
                assert np.array_equal(gathered, [data(r, size, np.int32) for r in range(ranks)])
            else:
                assert gathered is None

    on_ranks(ranks, spins, body)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_thousand_sums_in_a_row_with_ranks_that_lag(ranks: int) -> None:
    def body(node: NodeMemory, rank: int) -> None:
        for turn in range(1000):
            if turn % (7 + rank) == 0:
                os.sched_yield()
            sums = np.full(2048, turn * (rank + 1), np.int64)
            node.sum(sums)
            assert (sums == turn * ranks * (ranks + 1) // 2).all()

    on_ranks(ranks, 2000, body)


def test_sums_wrap_instead_of_trapping() -> None:
    def body(node: NodeMemory, rank: int) -> None:
        sums = np.array([2**63 - 1, -(2**63)], np.int64)
        node.sum(sums)
        assert sums.tolist() == [-2, 0]

    on_ranks(2, 0, body)


def test_arrays_that_do_not_fit_are_refused() -> None:
    def body(node: NodeMemory, rank: int) -> None:
        with pytest.raises(TypeError, match=r"expected int64\[>=2, 3\], got int32\[2, 3\]"):
            node.sum(np.zeros((2, 3), np.int32))
        with pytest.raises((BufferError, ValueError)):
            node.sum(np.zeros((4, 4), np.int64).T[:, ::2])

    on_ranks(1, 0, body)


def test_the_memory_has_no_name_in_any_directory() -> None:
    before = set(Path("/dev/shm").iterdir())
    node = NodeMemory("test", 0, 2)
    assert set(Path("/dev/shm").iterdir()) <= before
    assert str(Path(node.path).readlink()) == "/memfd:test (deleted)"
    node.close_file()
    assert not Path(node.path).is_symlink()
    node.close()


def test_what_is_not_the_jobs_memory_is_refused() -> None:
    first, other = NodeMemory("one", 0, 2), NodeMemory("other", 0, 2)
    with pytest.raises(EnvironmentMismatch, match=r"/proc/\d+/fd/\d+ cannot be opened: No such file"):
        NodeMemory("one", 1, 2, path=other.path)
    first.close_file()
    with pytest.raises(EnvironmentMismatch, match="cannot be opened: No such file"):
        NodeMemory("one", 1, 2, path=first.path)
    NodeMemory("other", 1, 2, path=other.path).close()
    first.close()
    other.close()
