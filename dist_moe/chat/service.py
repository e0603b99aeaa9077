"""The back end on rank 0: hears the front end in a thread, answers in the main one, and never outlives it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import NoReturn

from dist_moe.chat.connection import Line, LineClosed
from dist_moe.chat.protocol import Done, Generate, Note, Piece, ProtocolError, Quit, Ready, Refused, Stop
from dist_moe.errors import Interrupted
from dist_moe.parallel.mpi import end_from_thread, running_mpi

Answer = Callable[[Generate, Callable[[Piece | Note], None], Callable[[], bool]], Done | Refused]
# An answer ends after the step that it is in. What takes longer (packing, loading, a long step) is ended from outside.
_ORDERLY_WITHIN_S = 0.7


class Service:
    """Rank 0's side of a chat, from before MPI starts to the end."""

    def __init__(self, line: Line) -> None:
        """Begin to listen; when the front end goes, the job ends within two seconds, wherever it is."""
        self._line = line
        self._inbox: queue.SimpleQueue[Generate | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._gone = threading.Event()
        self._left = threading.Event()
        threading.Thread(target=self._listen, name="chat", daemon=True).start()

    def serve(self, facts: Ready, answer: Answer) -> None:
        """Answer until the front end quits or is gone.

        Args:
            facts: The first thing that the front end hears.
            answer: Makes one answer; calls its second argument with each piece, and the third after each step to know
                whether to end.
        """
        try:
            self._line.send(facts)
            while (request := self._inbox.get()) is not None:
                self._line.send(answer(request, self._send_piece, self._interrupted))
        except LineClosed:
            return

    def leave(self) -> None:
        """From here on the main thread ends the job by itself."""
        self._left.set()

    def _interrupted(self) -> bool:
        return self._stop.is_set() or self._gone.is_set()

    def _send_piece(self, piece: Piece | Note) -> None:
        """Send; that the front end is gone is noticed after the step, so that all ranks end it together."""
        try:
            self._line.send(piece)
        except LineClosed:
            self._gone.set()

    def _listen(self) -> None:
        try:
            while True:
                message = self._line.receive()
                if isinstance(message, Quit):
                    self._inbox.put(None)
                elif isinstance(message, Stop):
                    self._stop.set()
                elif isinstance(message, Generate):
                    self._stop.clear()
                    self._inbox.put(message)
        except (LineClosed, ProtocolError):
            self._gone.set()
            self._inbox.put(None)
            if not self._left.wait(_ORDERLY_WITHIN_S):
                self._end()

    def _end(self) -> NoReturn:
        end_from_thread(running_mpi(), Interrupted.exit_code)
