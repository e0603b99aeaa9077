"""`mpirun -n N pytest --with-mpi` of this environment's MPI: passing runs, and what a failing test on one rank does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.launching import Finished, flavour

MpiRun = Callable[..., Finished]
TESTS = Path(__file__).resolve().parents[1]
MUST_END_WITHIN_S = 30
# A file outside the tests: the plugin by name, no settings, and no summary line that says an error's text again.
ALONE = ("-p", "helpers.mpi_session", "-c", os.devnull, "-rN", "--color=no")


def with_mpi(mpirun: MpiRun, ranks: int, *arguments: str, wait_s: int = 120) -> Finished:
    # Not python -m pytest, which finds the source folder before the installed package.
    command = (Path(sys.executable).with_name("pytest"), "--with-mpi", "-p", "no:cacheprovider", *arguments)
    return mpirun(ranks, *command, env={"DIST_MOE_TEST_WAIT_S": str(wait_s)}, cwd=TESTS.parent, timeout_s=120)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])  # make test-unit runs them on 4 ranks by itself
def test_the_exchanges_pass_on_every_number_of_ranks(mpirun: MpiRun, ranks: int) -> None:
    files = ("test_ranks.py", "test_host_sums.py", "test_token_exchange.py")
    done = with_mpi(mpirun, ranks, *(str(TESTS / "parallel" / name) for name in files))
    assert done.code == 0, done.output
    assert done.stdout.count("test session starts") == 1, done.output
    title = "Open MPI v" if flavour() == "openmpi" else "MPICH "
    assert f"ranks: {ranks} ({title}" in done.stdout


def fail_on_purpose(mpirun: MpiRun, folder: Path, body: str, wait_s: int = 120) -> Finished:
    """Run one test that does `body` with `world` on 4 ranks, from a file that the test collection never sees."""
    path = folder / "test_on_purpose.py"
    path.write_text(
        "import sys, pytest\n\n@pytest.mark.mpi\ndef test_before(world): pass\n\n"
        f"@pytest.mark.mpi\ndef test_on_purpose(world):\n    {body}\n\n"
        "@pytest.mark.mpi\ndef test_after(world): print('NEVER REACHED', file=sys.__stderr__, flush=True)\n"
    )
    done = with_mpi(mpirun, 4, *ALONE, str(path), wait_s=wait_s)
    assert done.code != 0, done.output
    assert done.seconds < MUST_END_WITHIN_S, done.output
    assert "NEVER REACHED" not in done.output
    assert done.stdout.count("test session starts") == 1, done.output
    return done


def test_a_failure_on_a_silent_rank_is_printed_once_by_rank_0(mpirun: MpiRun, tmp_path: Path) -> None:
    done = fail_on_purpose(mpirun, tmp_path, "assert world.rank != 2, 'on' + ' purpose'")
    assert done.output.count("AssertionError: on purpose") == 1, done.output
    assert "on rank 2 of 4" in done.stdout


def test_a_failure_on_all_ranks_is_printed_once(mpirun: MpiRun, tmp_path: Path) -> None:
    done = fail_on_purpose(mpirun, tmp_path, "assert not world.size, 'on' + ' purpose'")
    assert done.output.count("AssertionError: on purpose") == 1, done.output


@pytest.mark.parametrize("failing", [[0], [2, 3]])
def test_a_failure_while_the_others_wait_in_a_collective_ends_all(
    mpirun: MpiRun, tmp_path: Path, failing: list[int]
) -> None:
    body = f"assert world.rank not in {failing}, 'on' + ' purpose'; world.barrier()"
    done = fail_on_purpose(mpirun, tmp_path, body)
    assert done.output.count("AssertionError: on purpose") == 1, done.output
    assert f"rank {failing[0]} of 4" in done.output


def test_sys_exit_in_a_test_is_a_failure_of_that_test(mpirun: MpiRun, tmp_path: Path) -> None:
    done = fail_on_purpose(mpirun, tmp_path, "world.rank == 1 and sys.exit(0); world.barrier()")
    assert done.output.count("SystemExit: 0") == 1, done.output


def test_a_rank_that_leaves_a_collective_out_ends_the_wait(mpirun: MpiRun, tmp_path: Path) -> None:
    done = fail_on_purpose(mpirun, tmp_path, "world.rank != 1 and world.barrier()", wait_s=3)
    assert done.output.count("waited 3 s for ranks that did not finish the test") == 1, done.output


def test_a_file_that_one_rank_cannot_import_ends_all(mpirun: MpiRun, tmp_path: Path) -> None:
    path = tmp_path / "test_import.py"
    path.write_text(
        "import os, pytest\n"
        "rank = os.environ.get('PMI_RANK', os.environ.get('OMPI_COMM_WORLD_RANK'))\n"
        "assert rank != '3', 'on' + ' purpose'\n"
        "@pytest.mark.mpi\ndef test_one(world): pass\n"
    )
    done = with_mpi(mpirun, 4, *ALONE, str(path))
    assert done.code != 0
    assert done.seconds < MUST_END_WITHIN_S
    assert done.output.count("AssertionError: on purpose") == 1, done.output
