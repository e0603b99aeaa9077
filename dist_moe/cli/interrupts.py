"""Ctrl-C: the first ends a run after its step, with text and summary; a second one, or one at the start, at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Python looks at a signal between two of its own instructions: a main thread that has not done so by then is inside a
# kernel or an exchange, and may never come out.
_NOTICED_WITHIN_S = 0.5


class Interrupts:
    """What SIGINT means on this rank. Launchers send it to all ranks; rank 0 alone decides."""

    def __init__(self, *, leads: bool, end: Callable[[], object] | None = None) -> None:
        """Take over SIGINT, unless this process was started to ignore it.

        Args:
            leads: Whether this is rank 0; the others ignore the signal, as they end when rank 0 tells them.
            end: Ends the job from another thread, when it is to end at once but the main thread is stuck.
        """
        self._requested = False
        self._orderly = False
        self._ending = threading.Event()
        if not leads:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        elif signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._take)
            if end is not None:
                self._listen(end)

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
            self._ending.set()
            raise KeyboardInterrupt
        self._requested = True

    def _listen(self, end: Callable[[], object]) -> None:
        """Let a thread hear of signals when they come: the interpreter writes their numbers to a pipe at once."""
        hears, tells = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(tells, False)
        signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(hears, end), name="interrupts", daemon=True).start()

    def _hear(self, hears: int, end: Callable[[], object]) -> None:
        heard = 0
        while True:
            heard += os.read(hears, 1) == bytes([signal.SIGINT])
            wanted = 2 if self._orderly else 1
            if heard >= wanted and not self._ending.wait(_NOTICED_WITHIN_S):
                end()
