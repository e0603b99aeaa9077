"""Sequences that grow step by step, at the pace of who pulls them. On rank 0."""

from __future__ import annotations

from collections.abc import Callable, Generator

from dist_moe.engine.requests.request import Completion, FinishReason
from dist_moe.engine.requests.schedule import Schedule

Drawn = list[tuple[int, int]]


class Generation:
    """The requests of one call, between steps.

    Attributes:
        completions: One per request, growing.
    """

    def __init__(self, schedule: Schedule, run: Callable[[], Generator[Drawn, None, None]]) -> None:
        """Keep the queued requests.

        Args:
            schedule: Decides the steps.
            run: Runs them until the schedule is empty.
        """
        self._schedule = schedule
        self._run = run
        self.completions: list[Completion] = schedule.completions

    def steps(self) -> Generator[Drawn, None, None]:
        """Run a step on all ranks for each item: its tokens as (index of the request, token id).

        Closing it early ends the requests; what they computed may be reused. To be run once.

        Raises:
            AgreedError: As `Runtime.generate`.
        """
        return self._run()

    def end(self, index: int, reason: FinishReason) -> None:
        """End one request after the present step, if it is still in progress."""
        self._schedule.end(index, reason)

    def interrupt(self) -> None:
        """End all requests that are still in progress."""
        self._schedule.interrupt()
