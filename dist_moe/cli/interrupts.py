"""Signals that want an end: a run ends after its step, with text and summary.

A second Ctrl-C, or one at the start, ends it at once. SIGTERM and SIGUSR1, which schedulers send, never hurry a step.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dist_moe.errors import Interrupted, Terminated
from dist_moe.parallel.progress import Progress

# What Slurm, Kubernetes and system shutdown send, with a time limit of their own behind it.
FINISH = (signal.SIGTERM, signal.SIGUSR1)
# Python looks at a signal between two of its own instructions: a main thread that has not done so by then is inside a
# kernel or an exchange, and may never come out.
_NOTICED_WITHIN_S = 0.5


@contextmanager
def ending_signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 raise Terminated inside the block, so that files are put away, instead of killing.

    A second one kills. What was started to ignore them goes on doing so.
    """
    taken = [number for number in FINISH if signal.getsignal(number) is signal.SIG_DFL]

    def take(number: int, frame: FrameType | None) -> None:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)
        raise Terminated(number)

    for number in taken:
        signal.signal(number, take)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def ending_signals_kill() -> Iterator[None]:
    """Undo `ending_signals_raise` inside the block, whose other threads an exception would wait for."""
    raised = {number: signal.getsignal(number) for number in FINISH if callable(signal.getsignal(number))}
    for number in raised:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in raised.items():
            signal.signal(number, handler)


class Interrupts:
    """What SIGINT, SIGTERM and SIGUSR1 mean on this rank. Launchers send them to all ranks; rank 0 alone decides."""

    def __init__(
        self,
        *,
        leads: bool,
        end: Callable[[int], object] | None = None,
        progress: Progress | None = None,
        finish: bool = True,
    ) -> None:
        """Take over the signals that this process was not started to ignore.

        Args:
            leads: Whether this is rank 0; the others ignore SIGINT, as they end when rank 0 tells them.
            end: Ends the job with an exit code from another thread, when it is to end at once but the main thread is
                stuck.
            progress: Where another rank than 0 notes SIGTERM and SIGUSR1, for the watchdog to pass on.
            finish: Whether SIGTERM and SIGUSR1 wait for the step; else they kill, as they do by default.
        """
        self._number = 0
        self._orderly = False
        self._ending = threading.Event()
        self._progress = progress
        wanted = (signal.SIGINT, *FINISH) if finish else (signal.SIGINT,)
        taken = [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]
        if not leads:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in taken:
            if leads or number in FINISH:
                signal.signal(number, self._take if leads else self._note)
        if leads and taken and end is not None:
            self._listen(end)

    def requested(self) -> bool:
        """Whether somebody asked for the end."""
        return self._number != 0

    @property
    def final(self) -> bool:
        """Whether a scheduler did, so that no next question is waited for."""
        return self._number in FINISH

    def explain(self, error: Interrupted) -> None:
        """Let the error of an orderly end say which signal it was, and give that one's exit code."""
        if self.final:
            error.args = (f"{error} (by {signal.Signals(self._number).name})",)
            error.exit_code = 128 + self._number

    @contextmanager
    def orderly(self) -> Iterator[None]:
        """Inside the block the first Ctrl-C raises nothing: the block looks at `requested`."""
        self._orderly = True
        try:
            yield
        finally:
            self._orderly = False

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number in FINISH:
            self._number = number if not self.final else self._number
            if not self._orderly:
                self._ending.set()
                raise Terminated(number)
            return
        if self._number or not self._orderly:
            self._ending.set()
            raise KeyboardInterrupt
        self._number = number

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._progress is not None:
            self._progress.asked = number

    def _listen(self, end: Callable[[int], object]) -> None:
        """Let a thread hear of signals when they come: the interpreter writes their numbers to a pipe at once."""
        hears, tells = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(tells, False)
        signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(hears, end), name="interrupts", daemon=True).start()

    def _hear(self, hears: int, end: Callable[[int], object]) -> None:
        asked = False
        while True:
            number = os.read(hears, 1)[0]
            if number not in (signal.SIGINT, *FINISH):
                continue
            urgent = not self._orderly or (asked and number == signal.SIGINT)
            asked = True
            if urgent and not self._ending.wait(_NOTICED_WITHIN_S):
                end(128 + number)
