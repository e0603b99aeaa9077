"""Ctrl-C: the first ends a run after its step, with text and summary; a second one, or one at the start, at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """What SIGINT means on this rank. Launchers send it to all ranks; rank 0 alone decides."""

    def __init__(self, *, leads: bool) -> None:
        """Take over SIGINT, unless this process was started to ignore it.

        Args:
            leads: Whether this is rank 0; the others ignore the signal, as they end when rank 0 tells them.
        """
        self._requested = False
        self._orderly = False
        if not leads:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        elif signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._take)

    def requested(self) -> bool:
        """Whether the user asked for the end."""
        return self._requested

    @contextmanager
    def orderly(self) -> Iterator[None]:
        """Inside the block the first Ctrl-C raises nothing: the block looks at `requested`."""
        self._orderly = True
        try:
            yield
        finally:
            self._orderly = False

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._requested or not self._orderly:
            raise KeyboardInterrupt
        self._requested = True
