"""dist-moe reshard: a store cut into other shards, without its source."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from dist_moe.cli.shard import read_cut
from dist_moe.cli.shard_progress import ShardProgress, report_store
from dist_moe.cli.values import OneOf, PathName, Whole
from dist_moe.errors import Interrupted, PlaceError, UsageError
from dist_moe.parallel.launcher import detect_launcher


@click.command("reshard")
@click.argument("store", metavar="STORE", type=PathName())
@click.option("--nodes", type=Whole(min=1), help="Shards: one per node.")
@click.option(
    "--experts",
    type=OneOf(["whole", "sliced"]),
    help="Each shard gets whole experts, or a slice of every expert.  [default: as STORE has them, else whole]",
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
    help="Directory of the new store.  [default: ./<source>-<quant>-<nodes>]",
)
@click.option("--force", is_flag=True, help="Replace a store that stands there; anything else is left alone.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def reshard(
    store: str,
    nodes: int | None,
    experts: str | None,
    placement: str | None,
    output: str | None,
    force: bool,
    quiet: bool,
) -> None:
    """Cut STORE into another number of shards, the same bytes as dist-moe shard makes from the source.

    All shards must be here; each unit is compared with its checksum. An interrupted run continues where it stopped when
    it is repeated.
    """
    if not detect_launcher(os.environ).is_first:
        return
    from dist_moe.store.placement import EXPERT_LAYOUTS
    from dist_moe.store.plan import StoreOptions
    from dist_moe.store.reader import Store
    from dist_moe.store.recut import recut

    if placement is None and nodes is None:
        raise UsageError("reshard needs --nodes N, or --placement FILE, to know how many shards to make")
    placed = None if placement is None else read_cut(Path(placement), nodes, experts)
    opened = Store.open(store)
    manifest = opened.manifest
    shards = len(placed.shards) if placed else nodes or 1
    suffix = "-placed" if placed else ""
    destination = Path(output or f"{manifest.source_name}-{manifest.label}-{shards}{suffix}")
    own = manifest.experts if manifest.experts in EXPERT_LAYOUTS else "whole"
    options = StoreOptions(nodes=shards, experts=experts or own, placement=placed, force=force, allow_nonfinite=True)
    try:
        with ShardProgress(quiet) as progress:
            result = recut(opened, destination, options, progress)
    except PlaceError as error:
        raise PlaceError(f"{error} or choose another -o") from error
    except KeyboardInterrupt:
        raise Interrupted(f"{destination}: interrupted; repeat the same command to continue where it stopped") from None
    report_store(result.manifest.files, destination, result.written_files, result.manifest.nonfinite)
    click.echo(shlex.join(["mpirun", "-n", str(shards), "dist-moe", "run", "-m", str(destination)]))
