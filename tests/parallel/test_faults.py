"""A rank that fails, in each phase and way, ends the whole job: with its code, a line that names it, nothing left."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from helpers import launching
from helpers.jobs import STORY, Ended, Job, faulty, slow
from helpers.launching import flavour

pytestmark = pytest.mark.faults

RANKS = 4
JOBS_AT_A_TIME = 3
STALL_S = 3
START_S = 5
# Generous: the machine may be busy. A job that hangs would take for ever.
MUST_END_WITHIN_S = 45
TIMEOUTS = ("--stall-timeout", str(STALL_S), "--start-timeout", "30", "-n", "12")
KILLED = {"mpich": 9, "openmpi": 137}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The demo model, packed once."""
    env = {"DIST_MOE_CACHE": str(tmp_path_factory.mktemp("cache")), "DIST_MOE_YIELD": "1"}
    assert end(env, Case("none", "decode", 0)).code == 0
    return env


@dataclass(frozen=True)
class Case:
    """A rank that fails in a phase."""

    act: str
    phase: str
    rank: int


def end(env: dict[str, str], case: Case, *arguments: str) -> Ended:
    """Run a job in which a rank fails; whatever the failure, nothing is left."""
    command = faulty(case.act, case.phase, case.rank, *TIMEOUTS, *arguments)
    with Job(RANKS, *command, env=env) as job:
        ended = job.end(MUST_END_WITHIN_S)
    assert not ended.left, (case, ended)
    return ended


def ends(env: dict[str, str], cases: Iterable[Case], *arguments: str) -> Iterator[tuple[Case, Ended]]:
    """The ends of several jobs, most of whose time is waiting: some at a time."""
    cases = list(cases)
    with ThreadPoolExecutor(JOBS_AT_A_TIME) as pool:
        yield from zip(cases, pool.map(lambda case: end(env, case, *arguments), cases), strict=True)


def test_an_exception_on_one_rank(environment: dict[str, str]) -> None:
    places = [("start", 1), ("join", 1), ("load", 2), ("prefill", 1), ("decode", 0), ("decode", 1), ("exchange", 1)]
    for case, ended in ends(environment, (Case("raise", phase, rank) for phase, rank in places)):
        assert ended.code == 1, (case, ended)
        (line,) = ended.lines
        assert line.startswith(f"dist-moe: internal error on rank {case.rank} ("), (case, ended)
        assert line.endswith("RuntimeError: broken on purpose")
        assert ended.stderr.count("Traceback") == 1


def test_sys_exit_on_one_rank(environment: dict[str, str]) -> None:
    for case, ended in ends(environment, (Case("exit", phase, 1) for phase in ("load", "decode", "exchange"))):
        assert ended.code == 5, (case, ended)
        (line,) = ended.lines
        assert "internal error on rank 1 (" in line
        assert "left with sys.exit(5) while other ranks run" in line


def test_a_kernel_of_one_rank_that_gets_no_memory(environment: dict[str, str]) -> None:
    for case, ended in ends(environment, [Case("starve", "prefill", 1), Case("starve", "decode", 0)]):
        assert ended.code == 2, (case, ended)
        (line,) = ended.lines
        assert line.startswith(f"dist-moe: error: rank {case.rank} on "), (case, ended)
        assert ": out of memory: a kernel could not get " in line


def test_a_killed_rank(environment: dict[str, str]) -> None:
    places = [("start", 2), ("load", 2), ("prefill", 3), ("decode", 0), ("exchange", 2)]
    for case, ended in ends(environment, (Case("kill", phase, rank) for phase, rank in places)):
        assert ended.code == KILLED[flavour()], (case, ended)
        if flavour() == "openmpi":
            assert f"process rank {case.rank} with PID" in ended.stderr
            assert not ended.lines, (case, ended)
            continue
        assert "BAD TERMINATION" in ended.stdout + ended.stderr
        if case.phase == "start":  # Hydra names no rank: we do, once all ranks know each other
            continue
        (line,) = ended.lines
        assert line.startswith(f"dist-moe: error: rank {case.rank} on "), (case, ended)
        assert line.endswith(" has died (killed, perhaps for want of memory, or crashed)")


def test_a_stopped_rank(environment: dict[str, str]) -> None:
    places = [("load", 2), ("decode", 2), ("exchange", 1)]
    for case, ended in ends(environment, (Case("stop", phase, rank) for phase, rank in places)):
        assert ended.code == 75, (case, ended)
        (line,) = ended.lines
        assert line.startswith(f"dist-moe: error: rank {case.rank} on "), (case, ended)
        assert " has been silent for " in line


def test_a_stopped_first_rank_is_missed_by_the_others(environment: dict[str, str]) -> None:
    ended = end(environment, Case("stop", "decode", 0))
    assert ended.code == 75, ended
    (line,) = ended.lines
    assert line.startswith("dist-moe: error: rank 1 on "), ended
    assert "has had no word from rank 0 on " in line


def test_a_rank_that_hangs(environment: dict[str, str]) -> None:
    places = {
        ("decode", 0): ", layer 1, experts",
        ("prefill", 3): ", layer 1, experts",
        ("load", 2): "loading the model",
    }
    for case, ended in ends(environment, (Case("hang", phase, rank) for phase, rank in places)):
        assert ended.code == 75, (case, ended)
        (line,) = ended.lines
        stall = f"nothing has moved for {STALL_S} s (--stall-timeout): all wait for rank {case.rank} on "
        assert stall in line, (case, ended)
        assert line.endswith(places[case.phase, case.rank]), (case, ended)


def test_a_rank_that_never_arrives(environment: dict[str, str]) -> None:
    cases = [Case("stop", "start", 2), Case("hang", "start", 2), Case("stop", "join", 2)]
    for case, ended in ends(environment, cases, "--start-timeout", str(START_S)):
        assert ended.code == 75, (case, ended)
        (line,) = ended.lines
        assert line.startswith("dist-moe: error: rank 0 on "), (case, ended)
        assert f"MPI did not start within {START_S} s: some of the {RANKS} ranks did not arrive (" in line
        assert ("(rank 2 on this host is stopped)" in line) == (case.act == "stop")


@pytest.mark.parametrize("victim", ["mpirun", "proxy"])
def test_a_killed_launcher_leaves_no_rank(environment: dict[str, str], victim: str) -> None:
    if victim == "proxy" and flavour() == "openmpi":
        pytest.skip("prterun starts the ranks of its own host itself")
    with Job(RANKS, *slow(), env=environment) as job:
        job.wait_for_text()
        pid = job.process.pid if victim == "mpirun" else job.proxy()
        assert pid is not None
        job.hit(pid, signal.SIGKILL)
        ended = job.end(MUST_END_WITHIN_S)
    assert not ended.left, ended
    assert ended.code == (-9 if victim == "mpirun" else 255), ended


def test_a_script_between_launcher_and_rank_makes_no_orphan(environment: dict[str, str]) -> None:
    with Job(RANKS, "sh", "-c", '"$@"; exit $?', "sh", *slow(), env=environment) as job:
        job.wait_for_text()
        job.hit(job.process.pid, signal.SIGKILL)
        ended = job.end(MUST_END_WITHIN_S)
    assert not ended.left, ended


def test_ranks_that_see_only_themselves_say_so_once(environment: dict[str, str]) -> None:
    """The launcher of another MPI: each process would be 'rank 0 of 1' and tell its own story."""
    marks = [{"SLURM_STEP_NUM_TASKS": str(RANKS), "SLURM_PROCID": str(rank)} for rank in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as pool:
        command = faulty("none", "decode", 0)
        ends = list(pool.map(lambda mark: launching.run(*command, env=environment | mark), marks))
    assert [ended.code for ended in ends] == [3] * RANKS
    said = [line for ended in ends for line in ended.stderr.splitlines() if line.startswith("dist-moe: ")]
    assert len(said) == 1, said
    assert "srun started 4 ranks, but each of them sees only itself (this Python's MPI library is " in said[0]
    assert "--mpi=pmix for Open MPI or --mpi=pmi2 for MPICH" in said[0]
    assert not any(ended.stdout for ended in ends)


def test_a_job_that_is_well_is_left_alone(environment: dict[str, str]) -> None:
    with Job(RANKS, *faulty("none", "decode", 0, *TIMEOUTS, "--stall-timeout", "2"), env=environment) as job:
        ended = job.end(MUST_END_WITHIN_S)
    assert (ended.code, ended.lines, ended.left) == (0, [], ()), ended
    assert STORY[2] in ended.stdout
