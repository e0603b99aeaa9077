"""Where a chat's lines come from: what a reader does, and the one for pipes and terminals without cursor."""

from __future__ import annotations

import codecs
import os
import select
import sys
from collections.abc import Callable
from typing import Protocol

from dist_moe.errors import Interrupted

_READ_BYTES = 1 << 16
_LOOK_S = 0.2


class Reader(Protocol):
    """Asks the user for a message."""

    @property
    def is_interactive(self) -> bool:
        """Whether somebody sits there, whom a mark and hints help."""

    def read(self, mark: str) -> str:
        """The next message, which may have several lines.

        Args:
            mark: Shown before it.

        Raises:
            EOFError: There is none.
            KeyboardInterrupt: Ctrl-C.
            LineClosed: The job has ended meanwhile.
        """


class LineReader:
    """Reads lines of UTF-8 from a file descriptor; one that ends in a backslash goes on in the next."""

    def __init__(
        self,
        fd: int,
        *,
        look_at: int | None = None,
        ended: Callable[[], None] = lambda: None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Read from `fd`.

        Args:
            fd: Where the lines come from.
            look_at: A file descriptor that becomes readable when waiting is in vain.
            ended: Called then; raises.
            interrupted: Asked a few times a second: whether Ctrl-C, which raised nothing, wants the end.
        """
        self._fd, self._look_at, self._ended, self._interrupted = fd, look_at, ended, interrupted
        self._received = b""
        self._at_end = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.is_interactive = os.isatty(fd)

    def read(self, mark: str) -> str:
        """See `Reader.read`; bytes that are not UTF-8 become U+FFFD."""
        lines: list[str] = []
        while not lines or lines[-1].endswith("\\"):
            self._show(mark if not lines else "... ")
            if lines:
                lines[-1] = lines[-1][:-1]
            try:
                lines.append(self._line())
            except EOFError:
                if not lines:
                    raise
                break
        return "\n".join(lines)

    def _line(self) -> str:
        while b"\n" not in self._received and not self._at_end:
            self._wait()
            data = os.read(self._fd, _READ_BYTES)
            self._received += data
            self._at_end = not data
        if not self._received:
            self._at_end = not self.is_interactive  # Ctrl-D ends one question, not the terminal
            raise EOFError
        line, _, self._received = self._received.partition(b"\n")
        return self._decoder.decode(line, final=True).removesuffix("\r")

    def _wait(self) -> None:
        watched = [self._fd] if self._look_at is None else [self._fd, self._look_at]
        while True:
            readable, _, _ = select.select(watched, [], [], _LOOK_S)
            if self._interrupted():
                raise Interrupted("interrupted while waiting for a message")
            if self._look_at in readable:
                self._ended()
            if self._fd in readable:
                return

    def _show(self, mark: str) -> None:
        if self.is_interactive:
            sys.stderr.write(mark)
            sys.stderr.flush()
