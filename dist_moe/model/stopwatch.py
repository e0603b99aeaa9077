"""Where a step's time goes, part by part, on this rank; off unless somebody listens.

M marks · S steps
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from dist_moe.parallel.progress import Progress

Int64s = npt.NDArray[np.int64]


class Part(IntEnum):
    """What a stretch of a step is spent on."""

    EMBEDDING = 0  # and the angles of the rotary embedding
    ATTENTION = 1  # the attention halves, with norms and residual
    EXPERTS = 2  # the expert (or dense) halves, likewise
    EXCHANGE = 3  # messages between ranks, and waiting for them
    LM_HEAD = 4  # the last norm and the rows of logits
    SAMPLING = 5  # candidates, the draw, and what the caller does with a token
    OTHER = 6

    @property
    def label(self) -> str:
        """Its name in a table."""
        return self.name.lower()


@dataclass(frozen=True)
class StepTimes:
    """One finished step: its tokens, and its seconds by part."""

    prompt_tokens: int
    decoded_tokens: int
    seconds: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """All tokens of the step."""
        return self.prompt_tokens + self.decoded_tokens


@dataclass(frozen=True)
class Marks:
    """The ends of parts, in order; part, layer and the steps' bounds are alike on all ranks.

    Attributes:
        part_M: What ended, as `Part`.
        layer_M: The layer that it belonged to, where it is of one.
        time_M: Nanoseconds of the monotonic clock.
        first_S, stop_S: Which marks lie in each step.
    """

    part_M: Int64s
    layer_M: Int64s
    time_M: Int64s
    first_S: Int64s
    stop_S: Int64s


class MarkLog:
    """Keeps the marks inside steps until they are taken; of what does not fit, nothing."""

    MARKS = 1 << 15

    def __init__(self, progress: Progress) -> None:
        """Keep nothing yet; `progress` knows the layer."""
        self._progress = progress
        self._part, self._layer, self._time = (array("q", bytes(8 * self.MARKS)) for _ in range(3))
        self._count = 0
        self._firsts: list[int] = []
        self._inside = False

    @property
    def is_full(self) -> bool:
        """Whether the next step may find no room; on all ranks after the same step."""
        return self._count > self.MARKS // 2

    def begin_step(self) -> None:
        """What follows belongs to a new step; one that an exception left is forgotten."""
        self._forget_unfinished()
        self._firsts.append(self._count)
        self._inside = True

    def end_step(self) -> None:
        """What follows is rank 0's alone and is not kept."""
        self._inside = False

    def add(self, part: Part) -> None:
        """A part ends."""
        n = self._count
        if self._inside and n < self.MARKS:
            self._part[n] = part
            self._layer[n] = self._progress.layer
            self._time[n] = time.perf_counter_ns()
            self._count = n + 1

    def take(self) -> Marks:
        """Hand out the marks of finished steps and begin anew."""
        self._forget_unfinished()
        part_M, layer_M, time_M = (
            np.frombuffer(kept, np.int64, self._count).copy() for kept in (self._part, self._layer, self._time)
        )
        bounds = np.array([*self._firsts, self._count], np.int64)
        self._count = 0
        self._firsts = []
        return Marks(part_M, layer_M, time_M, first_S=bounds[:-1], stop_S=bounds[1:])

    def _forget_unfinished(self) -> None:
        if self._inside:
            self._count = self._firsts.pop()
            self._inside = False


class Stopwatch:
    """Divides the time of each step among its parts, without a gap.

    Attributes:
        on_step: Told each step at its end, or None.
        log: Keeps every mark inside a step, or None. With neither, the watch stands still.
    """

    def __init__(self) -> None:
        """Stand still."""
        self.on_step: Callable[[StepTimes], None] | None = None
        self.log: MarkLog | None = None
        self._seconds = [0.0] * len(Part)
        self._last_s = 0.0

    @property
    def runs(self) -> bool:
        """Whether somebody listens: where a microsecond counts, nothing is marked otherwise."""
        return self.on_step is not None or self.log is not None

    def start(self) -> None:
        """Begin a step."""
        if self.on_step is None:
            return
        self._seconds = [0.0] * len(Part)
        self._last_s = time.perf_counter()

    def mark(self, part: Part) -> None:
        """Book the time since the last mark to a part."""
        if self.log is not None:
            self.log.add(part)
        if self.on_step is None:
            return
        now_s = time.perf_counter()
        self._seconds[part] += now_s - self._last_s
        self._last_s = now_s

    def finish(self, prompt_tokens: int, decoded_tokens: int) -> None:
        """End the step and tell it."""
        if self.on_step is not None:
            self.on_step(StepTimes(prompt_tokens, decoded_tokens, tuple(self._seconds)))
