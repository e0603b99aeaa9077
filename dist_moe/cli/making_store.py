"""What `dist-moe shard` and `reshard` share: the options of a cut, progress, and what is said of the new store."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dist_moe import files
from dist_moe.cli.values import OneOf, PathName
from dist_moe.errors import Interrupted, PlaceError, UsageError

if TYPE_CHECKING:
    from dist_moe.store.convert import Conversion
    from dist_moe.store.placement import Placement

Command = TypeVar("Command", bound=Callable[..., Any])

_LINE_EVERY_S = 5.0

quiet_option = click.option("--quiet", is_flag=True, help="Show no progress.")


def cut_options(experts_default: str, directory_of: str) -> Callable[[Command], Command]:
    """Decorate a command with --experts, --placement, --output and --force.

    Args:
        experts_default: What --experts is where it is not given, as the help says it.
        directory_of: Of what -o names the directory.
    """
    options = (
        click.option(
            "--experts",
            type=OneOf(["whole", "sliced"]),
            help=f"Each shard gets whole experts, or a slice of every expert.  [default: {experts_default}]",
        ),
        click.option(
            "--placement",
            metavar="FILE|STORE",
            type=PathName(),
            help="What each node gets, as dist-moe place wrote it or as another store has it; in place of --nodes and "
            "--experts.",
        ),
        click.option(
            "-o",
            "--output",
            metavar="DIR",
            type=PathName(),
            help=f"Directory of the {directory_of}.  [default: ./<source>-<quant>-<nodes>]",
        ),
        click.option("--force", is_flag=True, help="Replace a store that stands there; anything else is left alone."),
    )

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def default_directory(source_name: str, format_label: str, shards: int, placed: bool) -> str:
    """What -o is where it is not given."""
    return f"{source_name}-{format_label}-{shards}{'-placed' if placed else ''}"


def make_store(make: Callable[[ShardProgress], Conversion], destination: Path, shards: int, quiet: bool) -> None:
    """Make a store and say what stands there, and how it is run.

    Raises:
        PlaceError: `make` cannot write there.
        Interrupted: Ctrl-C; what was written stays.
    """
    try:
        with ShardProgress(quiet) as progress:
            result = make(progress)
    except PlaceError as error:
        raise PlaceError(f"{error} or choose another -o") from error
    except KeyboardInterrupt:
        raise Interrupted(f"{destination}: interrupted; repeat the same command to continue where it stopped") from None
    _report(result, destination)
    click.echo(shlex.join(["mpirun", "-n", str(shards), "dist-moe", "run", "-m", str(destination)]))


def read_cut(path: Path, nodes: int | None, experts: str | None) -> Placement:
    """What --placement names: a file, or the cut of a store.

    Raises:
        UsageError: --nodes or --experts is given, too.
        StoreError: There is neither.
    """
    from dist_moe.store.placement_json import read_placement
    from dist_moe.store.reader import read_store_manifest

    for name, value in (("--nodes", nodes), ("--experts", experts)):
        if value is not None:
            raise UsageError(f"{name} {value}: the placement says that; leave out {name} or --placement")
    if files.is_directory(path):
        return read_store_manifest(path).placement
    return read_placement(path)


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


def _report(result: Conversion, destination: Path) -> None:
    """Say what stands at the destination, and how much of it is new."""
    all_files, written = result.manifest.files, result.written_files
    total_bytes = sum(file.file_bytes for file in all_files)
    for name, count in result.manifest.nonfinite.items():
        click.echo(f"warning: {name} has {count} weights that are NaN, infinite or too large for the format", err=True)
    if written:
        click.echo(f"{destination}: {len(all_files)} files, {total_bytes:,} bytes, {len(written)} of them written now")
    else:
        click.echo(f"{destination}: done: a store of these options stands there ({total_bytes:,} bytes)")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}"
