"""dist-moe reshard: a store cut into other shards, without its source."""

from __future__ import annotations

import os
from pathlib import Path

import click

from dist_moe.cli.making_store import cut_options, default_directory, make_store, quiet_option, read_cut
from dist_moe.cli.values import PathName, Whole
from dist_moe.errors import UsageError
from dist_moe.parallel.launcher import detect_launcher


@click.command("reshard")
@click.argument("store", metavar="STORE", type=PathName())
@click.option("--nodes", type=Whole(min=1), help="Shards: one per node.")
@cut_options(experts_default="as STORE has them, else whole", directory_of="new store")
@quiet_option
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
    destination = Path(output or default_directory(manifest.source_name, manifest.label, shards, placed is not None))
    own = manifest.experts if manifest.experts in EXPERT_LAYOUTS else "whole"
    options = StoreOptions(nodes=shards, experts=experts or own, placement=placed, force=force, allow_nonfinite=True)
    make_store(lambda progress: recut(opened, destination, options, progress), destination, shards, quiet)
