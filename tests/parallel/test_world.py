"""One rank without MPI, and the merging of many ranks' error lines."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from dist_moe.errors import EnvironmentMismatch, StoreError, UsageError
from dist_moe.parallel.exchange import HEADER_WORDS, Exchange
from dist_moe.parallel.launcher import Launcher
from dist_moe.parallel.world import AgreedError, World, merge_lines
from helpers.launching import child_environment


def test_a_plain_process_is_a_world_of_one_without_mpi() -> None:
    world = World.start(Launcher())
    assert (world.rank, world.size, world.is_leader, world.library, world.comm) == (0, 1, True, "none", None)
    assert (world.node, world.nodes, world.local_rank, world.local_size) == (0, 1, 0, 1)
    world.agree(None, "testing")
    world.barrier()
    world.finalize()


def test_a_world_of_one_agrees_with_itself() -> None:
    with pytest.raises(AgreedError, match=r"^no such store$") as caught:
        World().agree(EnvironmentMismatch("no such store"), "testing")
    assert caught.value.exit_code == 3


def test_one_rank_alone_exchanges_nothing() -> None:
    exchange = Exchange(World())
    sums = np.array([[3, -5]])
    fault_T = np.array([9], np.int32)
    exchange.sum_exact(sums)
    exchange.min_faults(fault_T)
    exchange.broadcast(sums)
    exchange.post_step(np.zeros(HEADER_WORDS, np.int64))
    assert (sums.tolist(), fault_T.tolist()) == ([[3, -5]], [9])
    local_Tn = np.ones((2, 3), np.float32)
    assert exchange.gather_columns(local_Tn, [3], None) is local_Tn
    assert exchange.gather_equal(local_Tn).shape == (1, 2, 3)
    ledger = exchange.ledger
    assert (ledger.count, ledger.wire_bytes, ledger.shared_bytes) == (0, 0, 0)


def test_importing_the_package_starts_no_mpi() -> None:
    code = (
        "import sys, dist_moe.parallel.world, dist_moe.parallel.exchange, dist_moe.parallel.entry;"
        "from dist_moe.parallel.launcher import Launcher; dist_moe.parallel.world.World.start(Launcher());"
        "assert 'mpi4py' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=child_environment(), check=True, timeout=60)


HOSTS = ("a", "a", "b", "c")


@pytest.mark.parametrize(
    ("texts", "lines"),
    [
        (["x", "x", "x", "x"], ("x",)),
        (["x\ny"] * 4, ("x", "y")),
        (["", "", "x", ""], ("rank 2 on b, loading: x",)),
        (["x", "x", "", "x"], ("ranks 0, 1, 3 on a, c, loading: x",)),
        (
            ["", "z\nw", "x", "x"],
            ("rank 1 on a, loading: z", "rank 1 on a, loading: w", "ranks 2, 3 on b, c, loading: x"),
        ),
    ],
)
def test_every_distinct_line_is_said_once_with_its_hosts(texts: list[str], lines: tuple[str, ...]) -> None:
    assert merge_lines(texts, HOSTS, "loading") == lines


def test_together_passes_other_exceptions_through() -> None:
    with pytest.raises(ValueError, match="a bug"), World().together("testing"):
        raise ValueError("a bug")


def test_together_agrees_once_on_nested_phases() -> None:
    def nested() -> None:
        with World().together("outer"), World().together("inner"):
            raise StoreError("x")

    with pytest.raises(AgreedError, match=r"^x$"):
        nested()


def test_an_error_without_text_says_its_name() -> None:
    with pytest.raises(AgreedError, match="UsageError"):
        World().agree(UsageError(), "testing")
