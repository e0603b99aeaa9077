"""dist-moe shard: a checkpoint becomes a store."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from dist_moe import files
from dist_moe.cli.values import OneOf, PathName, Whole
from dist_moe.errors import Interrupted, PlaceError, UsageError
from dist_moe.parallel.launcher import detect_launcher

if TYPE_CHECKING:
    from dist_moe.store.placement import Placement

_LINE_EVERY_S = 5.0


@click.command("shard")
@click.argument("source", required=False, metavar="[SRC]", type=PathName())
@click.option("--nodes", type=Whole(min=1), help="Shards: one per node.  [default: 1]")
@click.option(
    "--quant",
    type=OneOf(["f32", "bf16", "q8", "q4"]),
    help="Format of the matrices; routers, norms and the embedding keep theirs.  [default: what a GGUF file has, else "
    "q4]",
)
@click.option(
    "--group-size",
    type=OneOf(["32", "64", "128", "0"]),
    default="32",
    show_default=True,
    help="Weights per scale of q8 and q4; 0 is a whole row.",
)
@click.option(
    "--experts",
    type=OneOf(["whole", "sliced"]),
    help="Each shard gets whole experts, or a slice of every expert.  [default: whole]",
)
@click.option(
    "--placement",
    metavar="FILE|STORE",
    type=PathName(),
    help="What each node gets, as dist-moe place wrote it or as another store has it; in place of --nodes and "
    "--experts.",
)
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=PathName(),
    help="Directory of the store.  [default: ./<source>-<quant>-<nodes>]",
)
@click.option("--force", is_flag=True, help="Replace a store that stands there; anything else is left alone.")
@click.option(
    "--allow-nonfinite",
    is_flag=True,
    help="Pack a checkpoint with NaN or infinite weights: f32 keeps them, other formats store 0.",
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
def shard(
    source: str | None,
    nodes: int | None,
    quant: str | None,
    group_size: str,
    experts: str | None,
    placement: str | None,
    output: str | None,
    force: bool,
    allow_nonfinite: bool,
    quiet: bool,
) -> None:
    """Pack SRC (default: the bundled demo) into a store, a shard per node.

    SRC is a Hugging Face directory, a GGUF file, a QW3W file with its config.json beside it, or the id of a model on
    the Hugging Face hub, such as Qwen/Qwen3-30B-A3B, which is downloaded into the hub's own cache first. A store runs
    on any number of ranks. An interrupted run continues where it stopped when it is repeated.
    """
    if not detect_launcher(os.environ).is_first:
        return
    from dist_moe.checkpoint.source import open_source
    from dist_moe.kernels.formats import WeightFormat
    from dist_moe.store.carry import conversion_notes, default_format
    from dist_moe.store.convert import convert
    from dist_moe.store.plan import StoreOptions, source_name

    placed = None if placement is None else read_cut(Path(placement), nodes, experts)
    path = _source(source, quiet)
    _refuse_store(path)
    model = open_source(path)
    fmt = WeightFormat.parse(quant) if quant else default_format(model)
    shards = len(placed.shards) if placed else nodes or 1
    destination = Path(output or f"{source_name(path)}-{fmt.label}-{shards}{'-placed' if placed else ''}")
    options = StoreOptions(
        nodes=shards,
        format=fmt,
        group_size=int(group_size),
        experts=experts or "whole",
        placement=placed,
        force=force,
        allow_nonfinite=allow_nonfinite,
    )
    for line in conversion_notes(model, fmt, options.group_size):
        click.echo(line, err=True)
    try:
        with ShardProgress(quiet) as progress:
            result = convert(model, destination, options, progress)
    except PlaceError as error:
        raise PlaceError(f"{error} or choose another -o") from error
    except KeyboardInterrupt:
        raise Interrupted(f"{destination}: interrupted; repeat the same command to continue where it stopped") from None
    report_store(result.manifest.files, destination, result.written_files, result.manifest.nonfinite)
    click.echo(shlex.join(["mpirun", "-n", str(shards), "dist-moe", "run", "-m", str(destination)]))


def _source(source: str | None, quiet: bool) -> Path:
    """Where SRC lies; a model of the Hugging Face hub is downloaded first."""
    from dist_moe.checkpoint.hub import download, is_hub_id
    from dist_moe.demo import demo_model_directory

    if source is None:
        return demo_model_directory()
    return download(source, quiet) if is_hub_id(source) else Path(source)


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


def _refuse_store(directory: Path) -> None:
    """A store has a config.json, too, so that it would be taken for a checkpoint without weights."""
    from dist_moe.checkpoint.tensor_files import INDEX, SINGLE
    from dist_moe.store.manifest import MANIFEST_NAME, PROGRESS_NAME

    is_store = any(files.exists(directory / name) for name in (MANIFEST_NAME, PROGRESS_NAME))
    if is_store and not any(files.exists(directory / name) for name in (SINGLE, INDEX)):
        raise UsageError(
            f"{directory} is a store already: run it with dist-moe run -m {directory}, cut it into other shards with "
            f"dist-moe reshard {directory} --nodes N, or give the Hugging Face directory that it was made from"
        )


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
