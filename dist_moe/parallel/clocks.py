"""How far the hosts' clocks are apart: ranks of one host read the same monotonic clock, other hosts' began elsewhere.

Rank 0 asks the first rank of each other host for the time, some rounds in a row, and keeps the quickest round: the
answer was made between question and answer, so half of that round's time bounds the error, and it is nought where both
ways take equally long. Between two such samples the offset is interpolated, which follows clocks that drift.

R ranks · n times
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.parallel.world import World

Int64s = npt.NDArray[np.int64]

ROUNDS = 16

_QUESTION_TAG = 5
_ANSWER_TAG = 6


@dataclass(frozen=True)
class ClockSample:
    """What was found on rank 0 at one time.

    Attributes:
        at_ns: Rank 0's time.
        offset_R: What to take off a rank's times to get rank 0's, in nanoseconds.
        error_ns: By how much an offset may be wrong at most; 0 on one host.
    """

    at_ns: int
    offset_R: Int64s
    error_ns: int


def sample_clocks(world: World) -> ClockSample:
    """Compare the hosts' clocks; collective. Ranks other than 0 get offsets of 0."""
    offset_R = np.zeros(world.size, np.int64)
    error_ns = 0
    if world.comm is not None and world.nodes > 1:
        with world.progress.exchanging():
            for node in range(1, world.nodes):
                first = world.node_of_rank.index(node)
                if world.is_leader:
                    offset_ns, half_ns = _ask(world, first)
                    offset_R[np.array(world.node_of_rank) == node] = offset_ns
                    error_ns = max(error_ns, half_ns)
                elif world.rank == first:
                    _answer(world)
    return ClockSample(time.perf_counter_ns(), offset_R, error_ns)


def to_leaders_clock(times_Rn: Int64s, before: ClockSample, after: ClockSample) -> Int64s:
    """All ranks' times as rank 0's clock would have shown them.

    Args:
        times_Rn: Nanoseconds, each rank's by its own clock, between the two samples.
        before: The earlier sample.
        after: The later one.
    """
    if not (before.offset_R.any() or after.offset_R.any()):
        return times_Rn
    span_ns = max(1, after.at_ns - before.at_ns)
    passed_Rn = (times_Rn - before.offset_R[:, np.newaxis] - before.at_ns) / span_ns
    drift_R = (after.offset_R - before.offset_R)[:, np.newaxis]
    offset_Rn = before.offset_R[:, np.newaxis] + np.rint(np.clip(passed_Rn, 0, 1) * drift_R).astype(np.int64)
    return times_Rn - offset_Rn


def _ask(world: World, rank: int) -> tuple[int, int]:
    """A rank's clock minus ours, and half of the time of the quickest round."""
    assert world.comm is not None
    assert world.mpi is not None
    kind, quickest_ns, offset_ns = world.mpi.INT64_T, 1 << 62, 0
    question, answer = np.zeros(1, np.int64), np.empty(1, np.int64)
    for _ in range(ROUNDS):
        asked_ns = time.perf_counter_ns()
        world.comm.Send([question, kind], rank, _QUESTION_TAG)
        world.comm.Recv([answer, kind], rank, _ANSWER_TAG)
        heard_ns = time.perf_counter_ns()
        if heard_ns - asked_ns < quickest_ns:
            quickest_ns = heard_ns - asked_ns
            offset_ns = int(answer[0]) - (asked_ns + heard_ns) // 2
    return offset_ns, (quickest_ns + 1) // 2


def _answer(world: World) -> None:
    assert world.comm is not None
    assert world.mpi is not None
    kind = world.mpi.INT64_T
    question, answer = np.empty(1, np.int64), np.empty(1, np.int64)
    for _ in range(ROUNDS):
        world.comm.Recv([question, kind], 0, _QUESTION_TAG)
        answer[0] = time.perf_counter_ns()
        world.comm.Send([answer, kind], 0, _ANSWER_TAG)
