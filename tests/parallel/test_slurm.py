"""A real Slurm of one node starts, signals and requeues jobs; skipped where slurm-wlm is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from helpers import launching
from helpers.jobs import faulty, slow
from helpers.launching import flavour
from helpers.slurm import Slurm, why_not

pytestmark = [pytest.mark.slurm, pytest.mark.faults, pytest.mark.skipif(bool(why_not()), reason=why_not())]

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"
MPI_TYPES = {"mpich": "pmi2", "openmpi": "pmix"}
STORY = ("run", "-p", "Once upon a time", "--temperature", "0", "--threads", "1")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The demo model, packed once, and a `dist-moe` on PATH."""
    programs = tmp_path_factory.mktemp("bin")
    for name, command in (
        ("dist-moe", "-m dist_moe"),
        ("slow-dist-moe", f"{faulty('slow', 'decode', 0)[1]} slow decode 0 --"),
    ):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        (programs / name).chmod(0o755)
    return {
        "DIST_MOE_CACHE": str(tmp_path_factory.mktemp("cache")),
        "DIST_MOE_YIELD": "1",
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm") / "here") as started:
        yield started


def srun(slurm: Slurm, environment: dict[str, str], *command: str, mpi: str | None = None) -> launching.Finished:
    words = ("srun", "-n", "2", f"--mpi={mpi or MPI_TYPES[flavour()]}", "--kill-on-bad-exit=1", *command)
    return launching.run(*words, env={**environment, **slurm.environ}, timeout_s=120)


def test_srun_starts_ranks_that_find_each_other(slurm: Slurm, environment: dict[str, str]) -> None:
    alone = launching.run("dist-moe", *STORY, "-n", "12", env=environment)
    ranks = srun(slurm, environment, "dist-moe", *STORY, "-n", "12")
    assert ranks.code == 0, ranks.output
    assert ranks.stdout == alone.stdout
    assert "2 ranks on 1 host, started by slurm" in srun(slurm, environment, "dist-moe", "doctor").stdout


def test_the_wrong_mpi_type_is_named(slurm: Slurm, environment: dict[str, str]) -> None:
    done = srun(slurm, environment, "dist-moe", *STORY, "-n", "2", mpi="none")
    assert done.code in (3, 143), done.output  # of who failed first, or of who was ended for that
    assert "--mpi=pmix for Open MPI or --mpi=pmi2 for MPICH" in done.stderr
    assert done.stderr.count("dist-moe: error:") == 1, done.output


def test_usage_errors_are_said_once(slurm: Slurm, environment: dict[str, str]) -> None:
    done = srun(slurm, environment, "dist-moe", "run", "--max-tokens", "many")
    assert done.code in (2, 143), done.output
    assert done.stderr.count("dist-moe: error:") == 1, done.output


@pytest.mark.parametrize(("number", "code"), [("USR1", 138), ("TERM", 143)])
def test_a_signal_to_the_step_finishes_it(
    slurm: Slurm, environment: dict[str, str], tmp_path: Path, number: str, code: int
) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            ["srun", "-J", number, "-n", "2", f"--mpi={MPI_TYPES[flavour()]}", *slow()],
            env=launching.child_environment({**environment, **slurm.environ}),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        wait_for(lambda: len(out.read_text()) > 20)
        seen = out.read_text()
        slurm.run("scancel", f"--signal={number}", f"--name={number}")
        assert process.wait(60) == code, err.read_text()
    finally:
        launching.kill_tree(process)
    assert out.read_text().startswith(seen)
    assert f"tokens (by SIG{number})" in err.read_text()


def test_a_job_near_its_limit_goes_on_in_the_next_one(
    slurm: Slurm, environment: dict[str, str], tmp_path: Path
) -> None:
    """The parts together are the text of a run that nobody ended."""
    prompt, state = tmp_path / "prompt.txt", tmp_path / "state"
    prompt.write_text("Once upon a time")
    programs = tmp_path / "bin"
    programs.mkdir()
    first = Path(environment["PATH"].split(":")[0])
    # Slow in the first job only, so that the second one is quick.
    (programs / "dist-moe").write_text(
        f'#!/bin/sh\n[ "${{SLURM_RESTART_COUNT:-0}}" != 0 ] || [ "$1" != run ] || exec {first}/slow-dist-moe "$@"\n'
        f'exec {first}/dist-moe "$@"\n'
    )
    (programs / "dist-moe").chmod(0o755)
    environ = {**environment, **slurm.environ, "PATH": f"{programs}:{environment['PATH']}", "MAX_TOKENS": "60"}
    options = ("--temperature", "0", "--threads", "1", "--ignore-eos")
    log = tmp_path / "log"
    submitted = launching.run(
        "sbatch", "--parsable", "--time=5", "-n", "2", "--ntasks-per-node=2", f"--output={log}",
        str(SCRIPT), "", str(prompt), str(state), *options, env=environ,
    )  # fmt: skip
    job = submitted.stdout.strip()
    assert job.isdecimal(), submitted.output
    slurm.wait_for_state(job, "RUNNING")
    wait_for(lambda: "a slow step" in text_of(log), lambda: text_of(log) + slurm.logs())
    time.sleep(1.0)
    slurm.run("scancel", "--signal=USR1", job)
    slurm.wait_for_state(job, "PENDING")
    # Slurm starts it again after two minutes, so that the old script's end is not taken for the new one's.
    wait_for(lambda: not steps_of(job), lambda: f"still there: {steps_of(job)}")
    time.sleep(2.0)
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    (part,) = [json.loads(line) for line in (state / "parts.jsonl").read_text().splitlines()]
    assert part["finish_reason"] == "interrupted"
    assert slurm.wait_for_state(job, "COMPLETED", "FAILED", timeout_s=180) == "COMPLETED", log.read_text()
    whole = launching.run("dist-moe", *STORY, "-n", "60", "--ignore-eos", "--json", env=environment)
    assert (state / "answer.txt").read_text() == json.loads(whole.stdout)["text"]


def steps_of(job: str) -> list[str]:
    """Slurm's processes that watch over this job's steps."""
    names = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [name for name in names if name.startswith(f"slurmstepd: [{job}.")]


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_for(what: Callable[[], object], why: Callable[[], str] = str, timeout_s: float = 40) -> None:
    until_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < until_s, why()
        time.sleep(0.05)
