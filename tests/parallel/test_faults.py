"""A rank that fails, in each phase and way, ends the whole job: with its code, a line that names it, nothing left."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers import launching
from helpers.jobs import STORY, Ended, Job, faulty, slow
from helpers.launching import flavour

pytestmark = pytest.mark.faults

RANKS = 4
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
    assert end(env, "none", "decode", 0).code == 0
    return env


def end(env: dict[str, str], act: str, phase: str, rank: int, *arguments: str) -> Ended:
    """Run a job in which a rank fails; whatever the failure, nothing is left."""
    with Job(RANKS, *faulty(act, phase, rank, *TIMEOUTS, *arguments), env=env) as job:
        ended = job.end(MUST_END_WITHIN_S)
    assert not ended.left, ended
    return ended


@pytest.mark.parametrize(
    ("phase", "rank"),
    [("start", 2), ("join", 2), ("load", 2), ("prefill", 2), ("decode", 0), ("decode", 2), ("exchange", 2)],
)
def test_an_exception_on_one_rank(environment: dict[str, str], phase: str, rank: int) -> None:
    ended = end(environment, "raise", phase, rank)
    assert ended.code == 1, ended
    (line,) = ended.lines
    assert line.startswith(f"dist-moe: internal error on rank {rank} ("), ended
    assert line.endswith("RuntimeError: broken on purpose")
    assert ended.stderr.count("Traceback") == 1


@pytest.mark.parametrize("phase", ["load", "decode", "exchange"])
def test_sys_exit_on_one_rank(environment: dict[str, str], phase: str) -> None:
    ended = end(environment, "exit", phase, 1)
    assert ended.code == 5, ended
    (line,) = ended.lines
    assert "internal error on rank 1 (" in line
    assert "left with sys.exit(5) while other ranks run" in line


@pytest.mark.parametrize(("phase", "rank"), [("start", 2), ("load", 2), ("prefill", 3), ("decode", 0), ("exchange", 2)])
def test_a_killed_rank(environment: dict[str, str], phase: str, rank: int) -> None:
    ended = end(environment, "kill", phase, rank)
    assert ended.code == KILLED[flavour()], ended
    if flavour() == "openmpi":
        assert f"process rank {rank} with PID" in ended.stderr
    else:
        assert "BAD TERMINATION" in ended.stdout + ended.stderr
        assert ended.lines or phase == "start", ended  # Hydra names no rank: we do, once all ranks know each other
    for line in ended.lines:
        assert line.startswith(f"dist-moe: error: rank {rank} on "), ended
        assert line.endswith(" has died (killed, perhaps for want of memory, or crashed)")


@pytest.mark.parametrize(("phase", "rank"), [("load", 2), ("decode", 2), ("exchange", 1)])
def test_a_stopped_rank(environment: dict[str, str], phase: str, rank: int) -> None:
    ended = end(environment, "stop", phase, rank)
    assert ended.code == 75, ended
    (line,) = ended.lines
    assert line.startswith(f"dist-moe: error: rank {rank} on "), ended
    assert " has been silent for " in line


def test_a_stopped_first_rank_is_missed_by_the_others(environment: dict[str, str]) -> None:
    ended = end(environment, "stop", "decode", 0)
    assert ended.code == 75, ended
    (line,) = ended.lines
    assert line.startswith("dist-moe: error: rank 1 on "), ended
    assert "has had no word from rank 0 on " in line


@pytest.mark.parametrize(("phase", "rank", "place"), [("decode", 0, "experts"), ("prefill", 3, "experts")])
def test_a_rank_that_hangs(environment: dict[str, str], phase: str, rank: int, place: str) -> None:
    ended = end(environment, "hang", phase, rank)
    assert ended.code == 75, ended
    (line,) = ended.lines
    assert f"nothing has moved for {STALL_S} s (--stall-timeout): all wait for rank {rank} on " in line, ended
    assert f", layer 1, {place}" in line


def test_a_rank_that_hangs_while_it_loads(environment: dict[str, str]) -> None:
    ended = end(environment, "hang", "load", 2)
    assert ended.code == 75, ended
    (line,) = ended.lines
    assert f"nothing has moved for {STALL_S} s (--stall-timeout): all wait for rank 2 on " in line, ended
    assert line.endswith(", which is stuck in loading the model")


@pytest.mark.parametrize(("act", "phase"), [("stop", "start"), ("hang", "start"), ("stop", "join")])
def test_a_rank_that_never_arrives(environment: dict[str, str], act: str, phase: str) -> None:
    ended = end(environment, act, phase, 2, "--start-timeout", str(START_S))
    assert ended.code == 75, ended
    (line,) = ended.lines
    assert line.startswith("dist-moe: error: rank 0 on "), ended
    assert f"MPI did not start within {START_S} s: some of the {RANKS} ranks did not arrive (" in line
    assert ("(rank 2 on this host is stopped)" in line) == (act == "stop")


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
    assert "srun started 4 ranks, but this Python's MPI library is " in said[0]
    assert "which sees only itself" in said[0]
    assert not any(ended.stdout for ended in ends)


def test_a_job_that_is_well_is_left_alone(environment: dict[str, str]) -> None:
    with Job(RANKS, *faulty("none", "decode", 0, *TIMEOUTS, "--stall-timeout", "2"), env=environment) as job:
        ended = job.end(MUST_END_WITHIN_S)
    assert (ended.code, ended.lines, ended.left) == (0, [], ()), ended
    assert STORY[2] in ended.stdout
