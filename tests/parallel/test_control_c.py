"""Ctrl-C, and what reaches stdout before the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

from helpers import launching
from helpers.faulty import SLOW
from helpers.jobs import Job, packed_demo, slow
from helpers.launching import flavour

pytestmark = pytest.mark.faults

RANKS = 4
MUST_END_WITHIN_S = 45


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The demo model, packed once."""
    return packed_demo(tmp_path_factory.mktemp("cache"))


def stop_a_rank(job: Job) -> None:
    """Keep the step from ending."""
    os.kill(job.ranks()[2], signal.SIGSTOP)


@pytest.mark.skipif(flavour() == "openmpi", reason="prterun kills the ranks itself")
def test_control_c_stops_after_the_step_with_text_and_summary(environment: dict[str, str]) -> None:
    with Job(RANKS, *slow(), env=environment) as job:
        job.wait_for_text()
        job.hit(job.process.pid, signal.SIGINT)
        ended = job.end(MUST_END_WITHIN_S)
    assert ended.code == 130, ended
    assert not ended.left, ended
    assert "tokens/s" in ended.stderr
    (line,) = ended.lines
    assert line.startswith("dist-moe: error: interrupted after "), ended


@pytest.mark.skipif(flavour() == "openmpi", reason="prterun kills the ranks itself")
def test_a_second_control_c_lets_hydra_kill_all_at_once(environment: dict[str, str]) -> None:
    """Hydra does not pass it on: it kills the ranks, and by who is faster its code is 0, 1 or 255."""
    with Job(RANKS, *slow(), env=environment) as job:
        job.wait_for_text()
        stop_a_rank(job)
        seen = job.stdout()
        for _ in range(2):
            time.sleep(0.5)
            job.hit(job.process.pid, signal.SIGINT)
        ended = job.end(MUST_END_WITHIN_S)
    assert not ended.left, ended
    assert ended.stdout.startswith(seen)
    assert not ended.lines, ended
    assert "Traceback" not in ended.stderr


def test_a_second_control_c_of_a_launcher_that_passes_it_on_ends_all_at_once(environment: dict[str, str]) -> None:
    """As srun does. Rank 0 stands in an exchange then, from which no signal gets it out."""
    with Job(RANKS, *slow(), env=environment) as job:
        job.wait_for_text()
        stop_a_rank(job)
        seen = job.stdout()
        for _ in range(2):
            time.sleep(0.5)
            job.hit(job.ranks()[0], signal.SIGINT)
        ended = job.end(MUST_END_WITHIN_S)
    assert ended.code == 130, ended
    assert not ended.left, ended
    assert ended.stdout.startswith(seen)
    (line,) = ended.lines
    assert line.startswith("dist-moe: error: interrupted in the middle of a step"), ended
    assert "Traceback" not in ended.stderr


@pytest.mark.skipif(flavour() == "mpich", reason="Hydra lets rank 0 end the job")
def test_what_was_made_is_out_before_prterun_kills(environment: dict[str, str]) -> None:
    with Job(RANKS, *slow(), env=environment) as job:
        job.wait_for_text()
        seen = job.stdout()
        job.hit(job.process.pid, signal.SIGINT)
        ended = job.end(MUST_END_WITHIN_S)
    assert ended.code == 1, ended
    assert not ended.left, ended
    assert ended.stdout.startswith(seen)
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("json_wanted", [False, True])
def test_control_c_of_one_rank_without_a_launcher(environment: dict[str, str], json_wanted: bool) -> None:
    process = subprocess.Popen(
        slow(*(["--json"] if json_wanted else [])),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=launching.child_environment(environment),
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == SLOW
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=MUST_END_WITHIN_S)
    finally:
        launching.kill_tree(process)
    assert process.returncode == 130, stderr
    assert "error: interrupted after " in stderr
    if json_wanted:
        assert json.loads(stdout)["finish_reason"] == "interrupted"
    else:
        assert "tokens/s" in stderr
