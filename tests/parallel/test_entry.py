"""How a job ends: every way out of a command, alone and on four ranks, with its code, its lines and its time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import launching
from helpers.launching import Finished, flavour

MpiRun = Callable[..., Finished]
MUST_END_WITHIN_S = 30
PROGRAM = """
import os, sys, time
from dist_moe.errors import *
from dist_moe.parallel.entry import guarded
from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.world import World
launcher = detect_launcher(os.environ)
def start(): return World.start(launcher)
def main():
{body}
    return 0
if __name__ == "__main__":
    sys.exit(guarded(main))
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], tuple[str, str]]:
    """The command line of a program whose main is the given lines."""

    def write(body: str) -> tuple[str, str]:
        path = tmp_path / "program.py"
        path.write_text(PROGRAM.format(body="\n".join("    " + line for line in body.splitlines())))
        return sys.executable, str(path)

    return write


Program = Callable[[str], tuple[str, str]]


def own_lines(done: Finished) -> list[str]:
    """The lines that are ours: launchers add their own."""
    return [line for line in done.stderr.splitlines() if line.startswith("dist-moe: ")]


ENDINGS = {
    "planned error before MPI": ("raise UsageError('no such option')", 2, "dist-moe: error: no such option"),
    "planned error of all": (
        "world = start()\nworld.agree(EnvironmentMismatch('too few cores'), 'x')",
        3,
        "dist-moe: error: too few cores",
    ),
    "planned error of all, not agreed": (
        "world = start()\nraise UsageError('more ranks than heads')",
        2,
        "dist-moe: error: more ranks than heads",
    ),
    "sys.exit before MPI": ("sys.exit('stopped early')", 1, "dist-moe: error: stopped early"),
    "interrupted": ("world = start()\nworld.agree(Interrupted('stopped'), 'x')", 130, "dist-moe: error: stopped"),
}


@pytest.mark.parametrize("ranks", [0, 4])
@pytest.mark.parametrize("name", ENDINGS)
def test_an_error_of_all_ranks_is_printed_once(mpirun: MpiRun, program: Program, name: str, ranks: int) -> None:
    body, code, line = ENDINGS[name]
    done = mpirun(ranks, *program(body)) if ranks else launching.run(*program(body))
    assert done.code == code, done.output
    assert own_lines(done) == [line], done.output
    assert "Traceback" not in done.output
    assert done.seconds < MUST_END_WITHIN_S


@pytest.mark.parametrize("ranks", [0, 1, 4])
def test_success_is_silent(mpirun: MpiRun, program: Program, ranks: int) -> None:
    command = program("world = start()\nworld.barrier()\nif world.is_leader: print('done')")
    done = mpirun(ranks, *command) if ranks else launching.run(*command)
    assert (done.code, done.stdout.strip(), done.stderr) == (0, "done", ""), done.output


def test_help_under_mpirun_needs_no_mpi(mpirun: MpiRun, program: Program) -> None:
    done = mpirun(4, *program("if launcher.is_first: print('usage')"))
    assert (done.code, done.stdout.strip(), done.stderr) == (0, "usage", ""), done.output


def test_a_planned_error_of_one_rank_is_said_by_rank_0_with_its_host(mpirun: MpiRun, program: Program) -> None:
    done = mpirun(
        4,
        *program("world = start()\nwith world.together('opening'):\n    if world.rank == 2: raise StoreError('gone')"),
    )
    assert done.code == 2, done.output
    (line,) = own_lines(done)
    assert line.startswith("dist-moe: error: rank 2 on ")
    assert line.endswith(", opening: gone")


def test_every_hosts_line_is_said_once(mpirun: MpiRun, program: Program) -> None:
    done = mpirun(4, *program("world = start()\nworld.agree(StoreError(f'shard {world.rank % 2}'), 'opening')"))
    assert done.code == 2, done.output
    assert [line.split(", opening: ")[1] for line in own_lines(done)] == ["shard 0", "shard 1"]
    assert "ranks 0, 2 on " in own_lines(done)[0]


# What one rank does while the others wait in a collective, its code and what its line says.
LONELY = {
    "a bug": ("raise ValueError('broken')", 1, "internal error on rank {rank} (", "ValueError: broken"),
    "sys.exit": ("sys.exit(5)", 5, "internal error on rank {rank} (", "left with sys.exit(5)"),
    "sys.exit(0)": ("sys.exit(0)", 1, "internal error on rank {rank} (", "left with sys.exit(0)"),
    "a planned error": ("raise StoreError('damaged')", 2, "error: damaged", "error: damaged"),
}


@pytest.mark.parametrize(("name", "rank"), [("a bug", 0), *((name, 3) for name in LONELY)])
def test_one_rank_that_leaves_ends_all(mpirun: MpiRun, program: Program, name: str, rank: int) -> None:
    act, code, start, end = LONELY[name]
    done = mpirun(4, *program(f"world = start()\nif world.rank == {rank}: {act}\nworld.barrier()"))
    assert done.code == code, done.output
    assert done.seconds < MUST_END_WITHIN_S
    (line,) = own_lines(done)
    assert start.format(rank=rank) in line
    assert end in line
    assert ("Traceback" in done.stderr) == (name == "a bug")


@pytest.mark.parametrize("first", [0, 2])
def test_a_bug_on_several_ranks_is_printed_once(mpirun: MpiRun, program: Program, first: int) -> None:
    done = mpirun(
        4, *program(f"world = start()\nif world.rank >= {first}: raise ValueError('broken')\nworld.barrier()")
    )
    assert done.code == 1, done.output
    assert len(own_lines(done)) == 1, done.output
    assert done.stderr.count("Traceback") == 1


def test_one_rank_that_fails_before_mpi_ends_those_that_wait_in_its_start(mpirun: MpiRun, program: Program) -> None:
    done = mpirun(4, *program("if launcher.rank == 2: raise StoreError('broken')\nstart().barrier()"))
    assert done.code == 2, done.output
    assert done.seconds < MUST_END_WITHIN_S
    (line,) = own_lines(done)
    assert line.endswith("broken")


def test_a_killed_rank_ends_all_with_the_launchers_code(mpirun: MpiRun, program: Program) -> None:
    done = mpirun(4, *program("world = start()\nif world.rank == 1: os.kill(os.getpid(), 9)\nworld.barrier()"))
    assert done.code == (137 if flavour() == "openmpi" else 9), done.output
    assert done.seconds < MUST_END_WITHIN_S


@pytest.mark.parametrize("ranks", [0, 4])
def test_control_c_ends_all_with_130(program: Program, ranks: int) -> None:
    command = program("world = start()\nprint('ready', flush=True)\ntime.sleep(60)")
    mpirun = (launching.mpirun_path(), "-n", str(ranks)) if ranks else ()
    process = subprocess.Popen(
        [*mpirun, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=launching.child_environment(),
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        said = ""
        while said.count("ready") < max(ranks, 1):
            said += process.stdout.read(1)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=MUST_END_WITHIN_S)
    finally:
        launching.kill_tree(process)
    # prterun ends the job itself on Ctrl-C, with its own code.
    assert process.returncode == (1 if ranks and flavour() == "openmpi" else 130), stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("launched", [False, True])
def test_a_closed_stdout_is_quiet(program: Program, launched: bool) -> None:
    mpirun = (launching.mpirun_path(), "-n", "1") if launched else ()
    process = subprocess.Popen(
        [*mpirun, *program("for i in range(200_000): print(i, 'x' * 100)")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=launching.child_environment(),
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("0 ")
        process.stdout.close()
        assert process.stderr is not None
        stderr = process.stderr.read() if not launched else ""
        process.wait(MUST_END_WITHIN_S)
    finally:
        launching.kill_tree(process)
    assert launched or (process.returncode, stderr) == (141, "")


@pytest.mark.parametrize(
    "launched_by",
    [
        {"PMI_SIZE": "4", "PMI_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
    ],
    ids=["hydra", "prterun", "srun"],
)
def test_a_library_that_does_not_see_the_launchers_ranks_is_named(
    program: Program, launched_by: dict[str, str]
) -> None:
    done = launching.run(*program("start()"), env=launched_by)
    assert done.code == 3, done.output
    (line,) = own_lines(done)
    assert "started 4 ranks" in line
    assert ("Open MPI v" if flavour() == "openmpi" else "MPICH ") in line
    advice = "--mpi=pmix for Open MPI or --mpi=pmi2 for MPICH" if "SLURM_PROCID" in launched_by else "'dist-moe[mpich]'"
    assert advice in line


def test_the_other_ranks_of_a_wrong_launcher_are_silent(program: Program) -> None:
    done = launching.run(*program("start()"), env={"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"})
    assert (done.code, own_lines(done)) == (3, []), done.output


def test_a_missing_mpi_is_one_sentence_under_mpirun_and_no_matter_without(mpirun: MpiRun, program: Program) -> None:
    missing = {"MPI4PY_LIBMPI": os.devnull}
    done = mpirun(4, *program("start()"), env=missing)
    assert done.code == 3, done.output
    (line,) = own_lines(done)
    assert "no MPI library can be loaded" in line
    assert "pip install 'dist-moe[mpich]'" in line
    assert launching.run(*program("assert start().size == 1"), env=missing).code == 0
