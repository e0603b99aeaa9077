"""SIGTERM and SIGUSR1: the step is finished, the text is out, the prompt cache is saved, and the code says by which."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from helpers.jobs import Job, packed_demo, slow
from helpers.launching import flavour

pytestmark = pytest.mark.faults

RANKS = 3
MUST_END_WITHIN_S = 45


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The demo model, packed once."""
    return packed_demo(tmp_path_factory.mktemp("cache"))


def signals_through_mpirun() -> list[signal.Signals]:
    """What the launcher passes on: at SIGTERM prterun kills the ranks a fifth of a second later."""
    return [signal.SIGUSR1] if flavour() == "openmpi" else [signal.SIGUSR1, signal.SIGTERM]


@pytest.mark.parametrize("number", signals_through_mpirun(), ids=lambda number: number.name)
def test_mpirun_passes_it_on_and_the_step_is_finished(
    environment: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    cache = tmp_path / "prompt.cache"
    with Job(RANKS, *slow("--prompt-cache", str(cache)), env=environment) as job:
        job.wait_for_text()
        seen = job.stdout()
        job.hit(job.process.pid, number)
        ended = job.end(MUST_END_WITHIN_S)
    assert ended.code == 128 + number, ended
    assert not ended.left, ended
    assert ended.stdout.startswith(seen)
    assert "finish reason: interrupted" in ended.stderr
    (line,) = ended.lines
    assert line.startswith("dist-moe: error: interrupted after ")
    assert line.endswith(f" tokens (by {number.name})"), ended
    assert cache.stat().st_size > 0


@pytest.mark.parametrize("rank", [0, 2])
def test_one_ranks_signal_ends_all(environment: dict[str, str], rank: int) -> None:
    """As when one host is taken down: rank 0 hears of it over the side channel."""
    with Job(RANKS, *slow(), env=environment) as job:
        job.wait_for_text()
        for _ in range(2):
            job.hit(job.ranks()[rank], signal.SIGTERM)
            time.sleep(0.01)
        ended = job.end(MUST_END_WITHIN_S)
    assert ended.code == 143, ended
    assert not ended.left, ended
    (line,) = ended.lines
    assert line.endswith(" tokens (by SIGTERM)"), ended


def test_while_a_rank_is_stopped_it_waits_for_the_step(environment: dict[str, str]) -> None:
    with Job(RANKS, *slow(), env=environment) as job:
        job.wait_for_text()
        stopped = job.ranks()[2]
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(0.3)
        job.hit(job.ranks()[0], signal.SIGTERM)
        time.sleep(2.0)
        assert job.process.poll() is None
        os.kill(stopped, signal.SIGCONT)
        ended = job.end(MUST_END_WITHIN_S)
    assert ended.code == 143, ended
    assert not ended.left, ended
