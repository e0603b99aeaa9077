"""The two ways to an answer: from a job over its line, and from this very process where it is rank 0."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from dist_moe.chat.answering import Answerer, Show
from dist_moe.chat.connection import Line, LineClosed
from dist_moe.chat.protocol import Done, Generate, Note, Piece, ProtocolError, Refused, Stop
from dist_moe.engine.engine import Engine

_STOPPING = b"\nstopping after this step; Ctrl-C once more leaves the chat\n"


class RemoteBackend:
    """A job that this process started. Ctrl-C ends the answer, a third one the chat."""

    def __init__(self, line: Line) -> None:
        """Use a line whose job is ready."""
        self._line = line
        self._signals = 0

    def answer(self, request: Generate, show: Show) -> Done | Refused:
        """See `session.Backend`.

        Raises:
            LineClosed: The job has ended.
            ProtocolError: It says something else than an answer.
            KeyboardInterrupt: The user is tired of waiting for the answer's end.
        """
        self._line.send(request)
        with self._stopping():
            while True:
                message = self._line.receive()
                if isinstance(message, Piece | Note):
                    show(message)
                elif isinstance(message, Done | Refused):
                    return message
                else:
                    raise ProtocolError(f"chat protocol: expected an answer, found {message.name}")

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        self._signals = 0
        before = signal.signal(signal.SIGINT, self._take)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals == 1:
            with contextlib.suppress(LineClosed):
                self._line.send(Stop())
        elif self._signals == 2:
            os.write(2, _STOPPING)
        else:
            raise KeyboardInterrupt


class OneInterrupt:
    """A Ctrl-C that raised nothing: the first one ends an answer, or the chat where there is none."""

    def __init__(self, requested: Callable[[], bool], final: Callable[[], bool] = lambda: False) -> None:
        """`requested` stays true once it was; `final` if it is to end the chat whatever it finds."""
        self._requested = requested
        self._final = final
        self._used = False

    def requested(self) -> bool:
        """Whether there was one that has not ended an answer."""
        return self._final() or (self._requested() and not self._used)

    def use_up(self) -> None:
        """An answer has ended: it may have been by this."""
        self._used = self._requested()


@dataclass
class LocalBackend:
    """This process is rank 0 of a job that somebody started with mpirun."""

    engine: Engine
    answerer: Answerer
    interrupt: OneInterrupt

    def answer(self, request: Generate, show: Show) -> Done | Refused:
        """See `session.Backend`."""
        try:
            return self.answerer.answer(self.engine, request, show, self.interrupt.requested)
        finally:
            self.interrupt.use_up()
