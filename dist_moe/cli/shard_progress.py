"""What shard and reshard say while they write, and when they are done."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import click

_LINE_EVERY_S = 5.0


class ShardProgress:
    """Shows `convert`'s progress on stderr: a bar on a terminal, else a line every few seconds."""

    def __init__(self, quiet: bool) -> None:
        """Show nothing at all if `quiet`."""
        self._quiet = quiet
        self._bar: Any = None
        self._done_bytes = 0
        self._first: tuple[float, int] | None = None
        self._next_line_s = 0.0

    def __call__(self, done_bytes: int, total_bytes: int, what: str) -> None:
        """Take note of progress."""
        if self._quiet:
            return
        if sys.stderr.isatty():
            self._draw(done_bytes, total_bytes, what)
        else:
            self._print(done_bytes, total_bytes, what)

    def __enter__(self) -> ShardProgress:
        """Return the progress itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar's line."""
        if self._bar is not None:
            self._bar.render_finish()
            self._bar = None

    def _draw(self, done_bytes: int, total_bytes: int, what: str) -> None:
        if self._bar is None:
            self._bar = click.progressbar(
                length=total_bytes,
                label="packing",
                file=sys.stderr,
                item_show_func=str,
                update_min_steps=max(1, total_bytes // 1000),
            )
        self._bar.update(
            max(0, done_bytes - self._done_bytes),
            f"{_gigabytes(done_bytes)} of {_gigabytes(total_bytes)} GB  {what}",
        )
        self._done_bytes = max(self._done_bytes, done_bytes)

    def _print(self, done_bytes: int, total_bytes: int, what: str) -> None:
        now_s = time.monotonic()
        if self._first is None:
            self._first, self._next_line_s = (now_s, done_bytes), now_s + _LINE_EVERY_S
        if now_s < self._next_line_s:
            return
        self._next_line_s = now_s + _LINE_EVERY_S
        started_s, started_bytes = self._first
        rate = (done_bytes - started_bytes) / (now_s - started_s)
        left = f", {(total_bytes - done_bytes) / rate:.0f} s left" if rate > 0 else ""
        click.echo(f"{what}: {_gigabytes(done_bytes)} of {_gigabytes(total_bytes)} GB{left}", err=True)


def report_store(files: Any, destination: Path, written: tuple[str, ...], nonfinite: dict[str, int]) -> None:
    """Say what stands at the destination, and how much of it is new."""
    total_bytes = sum(file.file_bytes for file in files)
    for name, count in nonfinite.items():
        click.echo(f"warning: {name} has {count} weights that are NaN, infinite or too large for the format", err=True)
    if written:
        click.echo(f"{destination}: {len(files)} files, {total_bytes:,} bytes, {len(written)} of them written now")
    else:
        click.echo(f"{destination}: done: a store of these options stands there ({total_bytes:,} bytes)")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}"
