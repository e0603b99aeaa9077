"""Where a step's time goes, part by part, on this rank; off unless somebody listens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum


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


class Stopwatch:
    """Divides the time of each step among its parts, without a gap.

    Attributes:
        on_step: Told each step at its end; None, and the watch stands still.
    """

    def __init__(self) -> None:
        """Stand still."""
        self.on_step: Callable[[StepTimes], None] | None = None
        self._seconds = [0.0] * len(Part)
        self._last_s = 0.0

    @property
    def runs(self) -> bool:
        """Whether somebody listens: where a microsecond counts, nothing is marked otherwise."""
        return self.on_step is not None

    def start(self) -> None:
        """Begin a step."""
        if self.on_step is None:
            return
        self._seconds = [0.0] * len(Part)
        self._last_s = time.perf_counter()

    def mark(self, part: Part) -> None:
        """Book the time since the last mark to a part."""
        if self.on_step is None:
            return
        now_s = time.perf_counter()
        self._seconds[part] += now_s - self._last_s
        self._last_s = now_s

    def finish(self, prompt_tokens: int, decoded_tokens: int) -> None:
        """End the step and tell it."""
        if self.on_step is not None:
            self.on_step(StepTimes(prompt_tokens, decoded_tokens, tuple(self._seconds)))
