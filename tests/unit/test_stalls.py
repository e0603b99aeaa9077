"""Whom a job waits for, from what the ranks report."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from dist_moe.parallel.progress import Phase, Progress
from dist_moe.parallel.stalls import Report, Seen, find_stall, name_ranks
from dist_moe.parallel.watchdog import OwnWatch

HOSTS = ("a", "a", "b", "b")
TIMEOUT_S = 60.0
WAITS = Report(7, 3, Phase.EXPERTS, waiting=True, still_s=61.0)
BUSY = replace(WAITS, waiting=False)


def ranks(*reports: Report | Seen) -> dict[int, Seen]:
    return {rank: report if isinstance(report, Seen) else Seen(report) for rank, report in enumerate(reports)}


def stall(*reports: Report | Seen) -> str:
    found = find_stall(ranks(*reports), HOSTS, TIMEOUT_S)
    assert found is not None
    return found


def test_the_rank_that_does_not_wait_is_the_cause() -> None:
    assert stall(WAITS, WAITS, BUSY, WAITS) == (
        "nothing has moved for 60 s (--stall-timeout): all wait for rank 2 on b, "
        "which is stuck in step 7, layer 3, experts"
    )
    assert "ranks 1, 2 on a, b, which are stuck" in stall(WAITS, BUSY, BUSY, WAITS)


@pytest.mark.parametrize(
    "moving",
    [
        replace(BUSY, still_s=2.0),  # slow, or reading pages
        replace(WAITS, still_s=2.0),
    ],
)
def test_while_one_rank_moves_there_is_no_stall(moving: Report) -> None:
    assert find_stall(ranks(WAITS, WAITS, moving, WAITS), HOSTS, TIMEOUT_S) is None


def test_outside_steps_standing_still_is_no_stall() -> None:
    for phase in (Phase.STARTING, Phase.IDLE, Phase.SCRUBBING):  # idle: waiting for the user, or packing
        idle = Report(7, 0, phase, still_s=900.0)
        assert find_stall(ranks(idle, idle, idle, idle), HOSTS, TIMEOUT_S) is None


def test_standing_still_while_loading_is_a_stall() -> None:
    loads = Report(0, 0, Phase.LOADING, still_s=61.0)
    waits = replace(loads, waiting=True)
    assert "all wait for rank 2 on b, which is stuck in loading the model" in stall(waits, waits, loads, waits)
    assert find_stall(ranks(waits, waits, replace(loads, still_s=1.0), waits), HOSTS, TIMEOUT_S) is None
    done = Report(0, 0, Phase.IDLE, waiting=True, still_s=61.0)
    assert "rank 1 on a still waits in loading the model, which the others have left" in stall(done, waits, done, done)
    early = replace(done, waiting=False)
    assert "rank 3 on b, which is stuck in start-up" in stall(waits, waits, waits, early)


def test_a_rank_that_is_still_between_steps_is_named() -> None:
    idle = Report(6, 3, Phase.IDLE, still_s=100.0)
    assert "all wait for rank 3 on b, which is stuck in the pause after step 6" in stall(WAITS, WAITS, WAITS, idle)
    lost = replace(idle, waiting=True)
    assert "rank 3 on b still waits in the pause after step 6, which the others have left" in stall(
        WAITS, WAITS, WAITS, lost
    )


def test_ranks_that_all_wait_are_told_by_their_place() -> None:
    assert "all ranks wait for each other in step 7, layer 3, experts" in stall(WAITS, WAITS, WAITS, WAITS)
    behind = replace(WAITS, layer=2)
    assert "ranks 1, 2 on a, b still wait in step 7, layer 2, experts" in stall(WAITS, behind, behind, WAITS)
    done = Report(7, 3, Phase.IDLE, waiting=True, still_s=61.0)
    assert "rank 0 on a still waits in step 7, layer 3, experts" in stall(WAITS, done, done, done)


def test_silence_counts_always_and_names_all_silent_ranks() -> None:
    idle = Report(6, 0, Phase.IDLE)
    gone = Seen(replace(WAITS, still_s=0.0), 60.5)
    quiet = Seen(idle, 58.0)
    assert stall(idle, idle, gone, quiet) == (
        "ranks 2, 3 on b have been silent for 60 s (--stall-timeout), last seen in step 7, layer 3, experts: "
        "stopped, or the host or its network is down"
    )
    assert find_stall(ranks(idle, idle, quiet, idle), HOSTS, TIMEOUT_S) is None


def test_a_silent_rank_is_the_cause_of_a_standstill() -> None:
    assert "rank 1 on a has been silent for 59 s" in stall(WAITS, Seen(replace(BUSY, still_s=2.0), 59.0), WAITS, WAITS)


def test_a_rank_that_cannot_report_is_named_when_all_others_wait() -> None:
    known = {rank: Seen(WAITS) for rank in (0, 1, 3)}
    found = find_stall(known, HOSTS, TIMEOUT_S)
    assert found is not None
    assert "all others wait for rank 2 on b, which cannot report to rank 0" in found


def test_reports_travel() -> None:
    for report in (WAITS, BUSY, Report(leaving=True), Report(2**40, 93, Phase.LOGITS), Report(asked=15)):
        assert Report.unpack(report.pack()) == replace(report, still_s=float(report.still_s))
        assert len(report.pack()) == Report.SIZE


def test_many_ranks_are_counted() -> None:
    hosts = tuple(f"n{rank}" for rank in range(20))
    assert name_ranks(range(20), hosts) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more on n0, n1, n2, n3 and others"
    assert name_ranks([3], hosts) == "rank 3 on n3"


def test_a_rank_moves_when_its_place_changes() -> None:
    progress = Progress()
    watch = OwnWatch(progress)
    assert watch.look(1.0).still_s in (0.0, 1.0)  # the test's process may have read a page
    progress.begin(Phase.EMBEDDING)
    assert watch.look(1.0) == Report(1, 0, Phase.EMBEDDING, waiting=False, still_s=0.0)
    progress.phase, progress.layer = Phase.EXPERTS, 4
    progress.exchanges, progress.waiting = 1, 1
    assert watch.look(1.0) == Report(1, 4, Phase.EXPERTS, waiting=True, still_s=0.0)
    assert watch.look(1.0).still_s == 1.0
    assert watch.look(1.5).still_s == 2.5
    progress.exchanges = 2  # the next exchange of the same place
    assert watch.look(1.0).still_s == 0.0
    progress.waiting = 0
    progress.end()
    assert watch.look(1.0) == Report(1, 4, Phase.IDLE, waiting=False, still_s=0.0)


def test_a_rank_that_computes_moves_while_it_loads() -> None:
    progress = Progress()
    watch = OwnWatch(progress)
    with progress.loading():
        watch.look(1.0)
        burn(0.1)
        assert watch.look(1.0) == Report(0, 0, Phase.LOADING, waiting=False, still_s=0.0)
        assert still_s_after_a_rest(watch) == 1.0
        with progress.exchanging():
            watch.look(1.0)
            burn(0.1)  # MPI waits in a loop
            assert watch.look(1.0).still_s == 1.0
    progress.begin(Phase.EXPERTS)
    watch.look(1.0)
    burn(0.1)
    assert watch.look(1.0).still_s in (0.0, 1.0)  # the test's process may have read a page
    assert progress.mark() == (1, 0, Phase.EXPERTS, 1, 0)


def burn(cpu_s: float) -> None:
    until_s = time.process_time() + cpu_s
    while time.process_time() < until_s:
        pass


def still_s_after_a_rest(watch: OwnWatch) -> float:
    """The test's process may have read a page: once more then."""
    found = watch.look(1.0).still_s
    return found if found else watch.look(1.0).still_s
