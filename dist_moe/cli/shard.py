"""dist-moe shard: a checkpoint becomes a store."""

from __future__ import annotations

import os
from pathlib import Path

import click

from dist_moe import files
from dist_moe.cli.making_store import cut_options, default_directory, make_store, quiet_option, read_cut
from dist_moe.cli.values import OneOf, PathName, Whole
from dist_moe.errors import UsageError
from dist_moe.parallel.launcher import detect_launcher


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
    "--scales",
    type=OneOf(["absmax", "mse"]),
    default="absmax",
    show_default=True,
    help="Scales of q8 and q4: from the largest weight, or of least squared error (slower to pack).",
)
@cut_options(experts_default="whole", directory_of="store")
@click.option(
    "--allow-nonfinite",
    is_flag=True,
    help="Pack a checkpoint with NaN or infinite weights: f32 keeps them, other formats store 0.",
)
@click.option(
    "--threads", type=Whole(min=1), help="Threads that pack; the bytes do not depend on it.  [default: all CPUs]"
)
@quiet_option
def shard(
    source: str | None,
    nodes: int | None,
    quant: str | None,
    group_size: str,
    scales: str,
    experts: str | None,
    placement: str | None,
    output: str | None,
    force: bool,
    allow_nonfinite: bool,
    threads: int | None,
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
    from dist_moe.kernels.formats import ScaleChoice, WeightFormat
    from dist_moe.store.carry import conversion_notes, default_format
    from dist_moe.store.convert import convert
    from dist_moe.store.plan import StoreOptions, source_name

    placed = None if placement is None else read_cut(Path(placement), nodes, experts)
    path = source_path(source, quiet)
    _refuse_store(path)
    model = open_source(path)
    fmt = WeightFormat.parse(quant) if quant else default_format(model)
    shards = len(placed.shards) if placed else nodes or 1
    destination = Path(output or default_directory(source_name(path), fmt.label, shards, placed is not None))
    options = StoreOptions(
        nodes=shards,
        format=fmt,
        group_size=int(group_size),
        scales=ScaleChoice.parse(scales),
        experts=experts or "whole",
        placement=placed,
        force=force,
        allow_nonfinite=allow_nonfinite,
        threads=threads or 0,
    )
    for line in conversion_notes(model, fmt, options.group_size):
        click.echo(line, err=True)
    make_store(lambda progress: convert(model, destination, options, progress), destination, shards, quiet)


def source_path(source: str | None, quiet: bool) -> Path:
    """Where SRC lies; a model of the Hugging Face hub is downloaded first."""
    from dist_moe.checkpoint.hub import download, is_hub_id
    from dist_moe.demo import demo_model_directory

    if source is None:
        return demo_model_directory()
    return download(source, quiet) if is_hub_id(source) else Path(source)


def _refuse_store(directory: Path) -> None:
    """A store has a config.json, too, so that it would be taken for a checkpoint without weights."""
    from dist_moe.checkpoint.qw3w_directory import is_qw3w_directory
    from dist_moe.checkpoint.tensor_files import INDEX, SINGLE
    from dist_moe.store.manifest import MANIFEST_NAME, PROGRESS_NAME

    is_store = any(files.exists(directory / name) for name in (MANIFEST_NAME, PROGRESS_NAME))
    if (
        is_store
        and not is_qw3w_directory(directory)
        and not any(files.exists(directory / name) for name in (SINGLE, INDEX))
    ):
        raise UsageError(
            f"{directory} is a store already: run it with dist-moe run -m {directory}, cut it into other shards with "
            f"dist-moe reshard {directory} --nodes N, or give the Hugging Face directory that it was made from"
        )
