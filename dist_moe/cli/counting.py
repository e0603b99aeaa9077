"""Says on stderr how far a long calculation is; nothing of one that is quick."""

from __future__ import annotations

import sys
import time

import click

_QUICK_S = 2.0
_LINE_EVERY_S = 5.0


class CountProgress:
    """On a terminal one line that changes, elsewhere a line every few seconds."""

    def __init__(self, what: str) -> None:
        """Of what is counted, such as "placing layer"."""
        self._what = what
        self._next_s = time.monotonic() + _QUICK_S
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """So many are done; the last call, with all of them, ends the line."""
        now_s, on_terminal = time.monotonic(), sys.stderr.isatty()
        ends = done == total
        if (now_s < self._next_s and not (ends and self._shown)) or (ends and not on_terminal):
            return
        begin = "\r" if on_terminal else ""
        click.echo(f"{begin}{self._what} {done} of {total}", nl=ends or not on_terminal, err=True)
        self._shown = True
        self._next_s = now_s + (0.1 if on_terminal else _LINE_EVERY_S)
