"""Where a rank is: written by the step as it goes, read once a second by the watchdog."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class Phase(IntEnum):
    """What a rank is doing; the value travels over the side channel."""

    STARTING = 0
    IDLE = 1
    SCRUBBING = 2
    LOADING = 3
    EMBEDDING = 4
    ATTENTION = 5
    EXPERTS = 6
    LOGITS = 7
    REPORTING = 8

    @property
    def in_step(self) -> bool:
        """Whether a step, or another order of rank 0, is being carried out."""
        return self > Phase.LOADING

    @property
    def timed(self) -> bool:
        """Whether the watchdog's time runs: not while packing, scrubbing or waiting for the user."""
        return self >= Phase.LOADING


class Progress:
    """One rank's place in its work. Plain attributes, so that a layer pays a few assignments.

    Attributes:
        step: Steps begun so far; equal on all ranks inside a step.
        layer: The layer, inside the phases ATTENTION and EXPERTS.
        phase: What is being done.
        exchanges: Exchanges begun so far.
        waiting: How many exchanges this rank is inside of (one may be made of others); 0 while it computes.
        asked: The signal that asked this rank, which does not decide, for the job's end; 0 if none did.
    """

    __slots__ = ("asked", "exchanges", "layer", "phase", "step", "waiting")

    def __init__(self) -> None:
        """Before the first step."""
        self.step = 0
        self.layer = 0
        self.phase = Phase.STARTING
        self.exchanges = 0
        self.waiting = 0
        self.asked = 0

    def begin(self, phase: Phase) -> None:
        """A step, or another order of rank 0, begins."""
        self.step += 1
        self.layer = 0
        self.phase = phase

    def end(self) -> None:
        """The step is done; from here on nothing is expected of this rank."""
        self.phase = Phase.IDLE

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Let the watchdog count while the block prepares this rank for the first step."""
        self.phase = Phase.LOADING
        try:
            yield
        finally:
            self.phase = Phase.IDLE

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Let the watchdog know that inside the block this rank waits for others and does not compute."""
        self.exchanges += 1
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def mark(self) -> tuple[int, int, int, int, int]:
        """A value that changes whenever this rank moves."""
        return self.step, self.layer, self.phase, self.exchanges, self.waiting
