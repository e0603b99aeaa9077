"""`--wire` and plain sums on jobs whose ranks MPICH takes for hosts of their own; Open MPI has no such switch."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from helpers import launching
from helpers.launching import Finished, flavour

MpiRun = Callable[..., Finished]
EVERY_RANK_A_HOST = {"MPIR_CVAR_NOLOCAL": "1", "DIST_MOE_YIELD": "1"}
RUN = (
    sys.executable,
    "-m",
    "dist_moe",
    "run",
    "-p",
    "Once upon a time",
    "-n",
    "24",
    "--temperature",
    "0",
    "--threads",
    "1",
)

pytestmark = pytest.mark.skipif(flavour() == "openmpi", reason="Open MPI cannot be told that ranks share no memory")


def run(mpirun: MpiRun, ranks: int, *options: str, **env: str) -> Finished:
    """The demo model on so many hosts."""
    return mpirun(ranks, *RUN, *options, env=EVERY_RANK_A_HOST | env)


@pytest.fixture(scope="module")
def text() -> str:
    """Of one rank."""
    return launching.run(*RUN).stdout


@pytest.mark.parametrize("env", [{}, {"DIST_MOE_MPI_SUM": "1"}], ids=["packed", "MPI_SUM"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_hosts_write_the_text_of_one_rank(mpirun: MpiRun, text: str, ranks: int, env: dict[str, str]) -> None:
    done = run(mpirun, ranks, "-v", **env)
    assert done.code == 0, done.output
    assert done.stdout == text
    assert done.stderr.count("expected exchange") == 1, done.output


@pytest.mark.parametrize("wire", ["bf16", "q8"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_rounded_sums_give_one_warning_the_same_text_twice_and_equal_states(
    mpirun: MpiRun, ranks: int, wire: str
) -> None:
    first, second = (run(mpirun, ranks, "--wire", wire) for _ in range(2))
    assert first.code == 0, first.output  # ranks whose states differ end the job
    assert first.stderr.count(f"--wire {wire}: sums between hosts are rounded") == 1, first.output
    assert first.stdout == second.stdout


def test_sums_that_travel_exactly_cannot_be_rounded(mpirun: MpiRun) -> None:
    done = run(mpirun, 2, "--wire", "q8", "--exchange", "alltoall")
    assert done.code == 2, done.output
    assert done.stderr.count("those of alltoall are always exact") == 1, done.output


def test_mpi_cannot_round(mpirun: MpiRun) -> None:
    done = run(mpirun, 2, "--wire", "q8", DIST_MOE_MPI_SUM="1")
    assert done.code == 2, done.output
    assert done.stderr.count("--wire q8: MPI's own sum cannot round, leave DIST_MOE_MPI_SUM=1 out") == 1, done.output
