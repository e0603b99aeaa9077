"""What a rank notes of its exchanges and steps: times and bytes in arrays of fixed size; others add them up.

Only the two ends of an exchange are noted, by each rank's own clock. Who waited for whom is found afterwards, where all
ranks' notes lie side by side (`dist_moe.engine.watch.accounts`): ranks make the same exchanges in the same order, so
the nth note of one rank and the nth of another are of the same exchange.

n exchanges · S steps · L layers · M marks
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe.parallel.progress import Progress

Int64s = npt.NDArray[np.int64]

# Exchanges, and marks of a traced step, between two times that the ranks lay their notes together.
CAPACITY = 1 << 14
# Steps likewise.
STEPS = 1 << 10

_PHASES = 16  # a place is layer * _PHASES + phase
_KINDS = 16  # one number notes both: place * _KINDS + kind


class Kind(IntEnum):
    """What an exchange is for."""

    HEADER = 0  # the leader's word that a step, or another order, begins
    BROADCAST = 1  # the step's words, and whatever else rank 0 has for all
    SUMS = 2  # exact sums of all ranks, on all ranks
    FAULTS = 3  # the lowest fault of each token
    GATHER = 4  # candidates, logits and the like to rank 0
    SCATTER = 5  # alltoall: exact sums, each token's on the rank that owns it
    DISPATCH = 6  # alltoall: tokens to the nodes of their experts
    RETURN = 7  # alltoall: the experts' sums back to the tokens' owners
    COLLECT = 8  # alltoall: the owners' operands to all ranks

    @property
    def label(self) -> str:
        """Its name in a table."""
        return self.name.lower()

    @property
    def begins_on_leader(self) -> bool:
        """Whether nobody but rank 0 has something to say, so that nobody waits for another rank."""
        return self in (Kind.HEADER, Kind.BROADCAST)


@dataclass(frozen=True)
class Notes:
    """One rank's notes, or those of all ranks with a first axis R.

    Attributes:
        kind_n: Kind of each exchange.
        place_n: Layer and phase of the step that it belongs to; see `layer_of` and `phase_of`.
        begin_n, end_n: Nanoseconds of the monotonic clock.
        wire_n, shared_n: Bytes that this rank sent to other ranks by MPI, and put into its host's shared memory.
        first_S, stop_S: Which exchanges lie inside each step.
        step_begin_S, step_end_S: Nanoseconds.
        prompt_S, decoded_S: Tokens of each step.
        drawn_S: On rank 0, when the step's tokens were drawn and printed; 0 where nobody noted it.
        work_SL2: Chunks that this rank computed in each layer, and products of a chunk with a token.
        dropped: Exchanges that found no room.
    """

    kind_n: Int64s
    place_n: Int64s
    begin_n: Int64s
    end_n: Int64s
    wire_n: Int64s
    shared_n: Int64s
    first_S: Int64s
    stop_S: Int64s
    step_begin_S: Int64s
    step_end_S: Int64s
    prompt_S: Int64s
    decoded_S: Int64s
    drawn_S: Int64s
    work_SL2: Int64s
    dropped: int

    def of_all_ranks(self, arrays: Mapping[str, Int64s]) -> Notes:
        """These notes with other arrays, by their names."""
        changed: dict[str, Any] = dict(arrays)
        return replace(self, **changed)


def layer_of(place_n: Int64s) -> Int64s:
    """The layers of some places."""
    return place_n // _PHASES


def phase_of(place_n: Int64s) -> Int64s:
    """The phases of some places, as `Phase` numbers them."""
    return place_n % _PHASES


class Ledger:
    """Takes notes. Exchanges inside an exchange belong to the outer one.

    Attributes:
        wire_bytes, shared_bytes: Sent since the start; see `Notes`.
        step_tokens: Prompt and decoded tokens of the step that comes next, as rank 0 counts them; None: a step of
            more tokens than sequences is a prompt's.
    """

    def __init__(self, progress: Progress) -> None:
        """No notes yet.

        Args:
            progress: Says where in a step this rank is.
        """
        self._progress = progress
        self._what, self._begin, self._end, self._wire, self._shared = _columns(5, CAPACITY)
        self._first, self._stop, self._step_begin, self._step_end, self._prompt, self._decoded = _columns(6, STEPS)
        self._drawn = array("q", bytes(8 * STEPS))
        self._work = np.zeros((STEPS, 0, 2), np.int64)
        self._depth = self._began_ns = self._dropped = self._step_count = self.count = 0
        self.wire_bytes = self.shared_bytes = self._taken_wire_bytes = self._taken_shared_bytes = 0
        self.step_tokens: tuple[int, int] | None = None

    # ---- an exchange ----

    def begin(self) -> None:
        """An exchange begins on this rank."""
        if self._depth == 0:
            self._began_ns = time.perf_counter_ns()
        self._depth += 1

    def sent(self, wire_bytes: int, shared_bytes: int = 0) -> None:
        """Count bytes that this rank sends by MPI, or puts into its host's shared memory."""
        self.wire_bytes += wire_bytes
        self.shared_bytes += shared_bytes

    def end(self, kind: Kind) -> None:
        """The exchange is over for this rank."""
        self._depth -= 1
        if self._depth:
            return
        n, progress = self.count, self._progress
        if n == CAPACITY:
            self._dropped += 1
            return
        self._what[n] = (progress.layer * _PHASES + progress.phase) * _KINDS + kind
        self._begin[n] = self._began_ns
        self._end[n] = time.perf_counter_ns()
        self._wire[n] = self.wire_bytes
        self._shared[n] = self.shared_bytes
        self.count = n + 1

    # ---- a step ----

    def expect_layers(self, layers: int) -> None:
        """Make room for the work of a model's layers."""
        self._work = np.zeros((STEPS, layers, 2), np.int64)

    def begin_step(self, tokens: int, sequences: int) -> None:
        """A step begins on this rank; there is room for one, if the ledger was emptied whenever it was full."""
        s = self._step_count
        default = (tokens, 0) if tokens > sequences else (0, tokens)
        self._prompt[s], self._decoded[s] = self.step_tokens or default
        self._drawn[s] = 0
        self._first[s] = self.count
        self._step_begin[s] = time.perf_counter_ns()

    def end_step(self, work_L2: Int64s) -> None:
        """The step is over for this rank; see `Notes`."""
        s = self._step_count
        self._step_end[s] = time.perf_counter_ns()
        self._stop[s] = self.count
        self._work[s] = work_L2
        self._step_count = s + 1

    def end_draw(self) -> None:
        """On rank 0: the last step's tokens are drawn and printed."""
        if self._step_count:
            self._drawn[self._step_count - 1] = time.perf_counter_ns()

    def last_step_ms(self) -> tuple[float, float]:
        """Milliseconds of the last step, and of the exchanges inside it; 0 if it has been handed out since."""
        s = self._step_count - 1
        if s < 0:
            return 0.0, 0.0
        inside = range(self._first[s], self._stop[s])
        return (self._step_end[s] - self._step_begin[s]) * 1e-6, sum(
            self._end[n] - self._begin[n] for n in inside
        ) * 1e-6

    # ---- emptying ----

    @property
    def is_full(self) -> bool:
        """Whether the next step may find no room; on all ranks after the same step."""
        return self._step_count == STEPS or self.count > CAPACITY // 2

    def take(self) -> Notes:
        """Hand out the notes and begin anew."""
        n, steps = self.count, self._step_count
        what_n = _copy(self._what, n)
        notes = Notes(
            kind_n=what_n % _KINDS,
            place_n=what_n // _KINDS,
            begin_n=_copy(self._begin, n),
            end_n=_copy(self._end, n),
            wire_n=np.diff(_copy(self._wire, n), prepend=self._taken_wire_bytes),
            shared_n=np.diff(_copy(self._shared, n), prepend=self._taken_shared_bytes),
            first_S=_copy(self._first, steps),
            stop_S=_copy(self._stop, steps),
            step_begin_S=_copy(self._step_begin, steps),
            step_end_S=_copy(self._step_end, steps),
            prompt_S=_copy(self._prompt, steps),
            decoded_S=_copy(self._decoded, steps),
            drawn_S=_copy(self._drawn, steps),
            work_SL2=self._work[:steps].copy(),
            dropped=self._dropped,
        )
        self.count = self._step_count = self._dropped = 0
        self._taken_wire_bytes, self._taken_shared_bytes = self.wire_bytes, self.shared_bytes
        return notes


def _columns(count: int, length: int) -> list[array[int]]:
    return [array("q", bytes(8 * length)) for _ in range(count)]


def _copy(column: array[int], count: int) -> Int64s:
    return np.frombuffer(column, np.int64, count).copy()
