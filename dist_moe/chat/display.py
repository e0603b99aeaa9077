"""What a chat prints: the answer to stdout as it comes, all else to stderr."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import TextIO

from dist_moe.chat.protocol import PieceKind
from dist_moe.errors import UsageError

_DIM, _BOLD, _PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"
# What a terminal would obey: all control characters but newline and tab.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Display:
    """Prints one chat. On a terminal thinking is dim, and nobody's text can move the cursor or change a setting."""

    def __init__(
        self, *, show_thinking: bool, environ: Mapping[str, str], out: TextIO | None = None, err: TextIO | None = None
    ) -> None:
        """Look at where the output goes.

        Args:
            show_thinking: Print it, or only that there is some.
            environ: NO_COLOR and TERM decide about colours.
            out: Instead of stdout.
            err: Instead of stderr.
        """
        self.show_thinking = show_thinking
        self._out, self._err = out, err
        self.is_terminal = (out or sys.stdout).isatty()
        self._colours = self.is_terminal and not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb"
        self._part: PieceKind | None = None
        self._ends_line = True

    def piece(self, text: str, kind: PieceKind) -> None:
        """Print what an answer grew by."""
        if kind != self._part:
            self._begin(kind)
        if kind == "answer" or self.show_thinking:
            self._write(_CONTROL.sub("", text) if self.is_terminal else text)

    def end_answer(self) -> None:
        """End the answer's last line."""
        self._end_part()
        if not self._ends_line:
            self._write("\n")
        self._part = None

    def say(self, text: str) -> None:
        """Print a line about the chat itself, dim on a terminal."""
        for line in _CONTROL.sub("", text).split("\n"):
            self._say(f"{_DIM}{line}{_PLAIN}" if self._colours else line)

    def call(self, text: str) -> None:
        """Print a tool call."""
        line = _CONTROL.sub("", text)
        self._say(f"{_BOLD}{line}{_PLAIN}" if self._colours else line)

    def complain(self, text: str) -> None:
        """Print what could not be done."""
        self._say("dist-moe: error: " + _CONTROL.sub("", text))

    def _begin(self, kind: PieceKind) -> None:
        self._end_part()
        self._part = kind
        if kind == "answer":
            return
        if not self.show_thinking:
            self.say("thinking ...")
        elif self._colours:
            self._write(_DIM)
        else:
            self._write("[thinking]\n")

    def _end_part(self) -> None:
        if self._part != "reasoning" or not self.show_thinking:
            return
        if self._colours:
            self._write(_PLAIN)
        if not self._ends_line:
            self._write("\n")
        self._write("\n" if self._colours else "[end of thinking]\n")

    def _write(self, text: str) -> None:
        if not text:
            return
        out = self._out or sys.stdout
        try:
            out.write(text)
            out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UsageError(f"standard output cannot be written ({error.strerror}): send it elsewhere") from error
        if text not in (_DIM, _PLAIN):
            self._ends_line = text.endswith("\n")

    def _say(self, line: str) -> None:
        if not self._ends_line and self.is_terminal:
            self._write("\n")
        err = self._err or sys.stderr
        err.write(line + "\n")
        err.flush()
