"""Progress of a cold start on stderr: nothing where the weights are in memory, a bar on a terminal, else lines."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

# A start that takes no longer needs no words.
_QUIET_S = 1.0
_LINE_EVERY_S = 5.0


class ReadingProgress:
    """Told how many bytes of weights are in memory; the last call is the one with all of them."""

    def __init__(self, ranks: int) -> None:
        """The clock starts at the first call.

        Args:
            ranks: How many read at the same time; what is shown is rank 0's part.
        """
        self._of = "" if ranks == 1 else f" (rank 0 of {ranks})"
        self._first: tuple[float, int] | None = None
        self._next_line_s = 0.0
        self._bar: Any = None
        self._shown_bytes = 0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Take note of progress."""
        now_s = time.monotonic()
        if self._first is None:
            self._first, self._next_line_s = (now_s, done_bytes), now_s + _QUIET_S
        if now_s < self._next_line_s and (done_bytes < total_bytes or not self._shown_bytes):
            return
        if sys.stderr.isatty():
            self._draw(done_bytes, total_bytes)
        else:
            self._next_line_s = now_s + _LINE_EVERY_S
            click.echo(f"reading weights{self._of}: {self._figures(done_bytes, total_bytes)}", err=True)
        self._shown_bytes = done_bytes

    def _draw(self, done_bytes: int, total_bytes: int) -> None:
        """One line that is overwritten; its end is the end of reading."""
        if self._bar is None:
            self._bar = click.progressbar(
                length=total_bytes,
                label=f"reading weights{self._of}",
                file=sys.stderr,
                show_eta=False,
                item_show_func=str,
                update_min_steps=max(1, total_bytes // 1000),
            )
        self._bar.update(done_bytes - self._shown_bytes, self._figures(done_bytes, total_bytes))
        if done_bytes >= total_bytes:
            self._bar.render_finish()

    def _figures(self, done_bytes: int, total_bytes: int) -> str:
        assert self._first is not None
        started_s, started_bytes = self._first
        elapsed_s = max(1e-9, time.monotonic() - started_s)
        rate = (done_bytes - started_bytes) / elapsed_s
        left = f", {(total_bytes - done_bytes) / rate:.0f} s left" if rate > 0 and done_bytes < total_bytes else ""
        return f"{done_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s{left}"
