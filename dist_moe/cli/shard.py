"""dist-moe shard: a checkpoint becomes a store."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dist_moe import files
from dist_moe.cli.interrupts import ending_signals_kill
from dist_moe.cli.making_store import cut_options, default_directory, make_store, quiet_option, read_cut
from dist_moe.cli.packing_options import Packing, packing_options
from dist_moe.cli.packing_ranks import checkpoint_opener, pack_on_ranks
from dist_moe.cli.values import Number, OneOf, PathName, Whole
from dist_moe.errors import UsageError

if TYPE_CHECKING:
    from dist_moe.checkpoint.source import Source
    from dist_moe.store.placement import Placement
    from dist_moe.store.plan import StoreOptions
    from dist_moe.store.team import Team


@dataclass(frozen=True)
class ShardOptions(Packing):
    """`dist-moe shard`, as given."""

    source: str | None
    nodes: int | None
    write_recipe: str | None
    experts: str | None
    placement: str | None
    output: str | None
    force: bool
    allow_nonfinite: bool
    dry_run: bool
    as_json: bool


@click.command("shard")
@click.argument("source", required=False, metavar="[SRC]", type=PathName())
@click.option("--nodes", type=Whole(min=1), help="Shards: one per node.  [default: 1]")
@click.option(
    "--quant",
    type=OneOf(["f32", "bf16", "q8", "q4"]),
    help="Format of all matrices; routers, norms and the embedding keep theirs.  [default: what a GGUF file has, else "
    "q4]",
)
@click.option(
    "--recipe",
    metavar="NAME|FILE|STORE",
    type=PathName(),
    help="Formats by matrix: q4, q4-mixed (attention and lm_head in q8), q8, bf16, f32, a TOML file (docs/stores.md), "
    "or as another store has them; or auto: what suits --target-bits best; in place of --quant.",
)
@click.option(
    "--importance",
    metavar="FILE",
    type=PathName(),
    help="What dist-moe calibrate wrote: weights the search for scales (mse), and decides with --recipe auto.",
)
@click.option(
    "--target-bits",
    type=Number(min=1, max=32),
    help="With --recipe auto: bits per packed weight at most, on average, scales included.  [default: 4.5]",
)
@click.option(
    "--write-recipe",
    metavar="FILE.toml",
    type=PathName(),
    help="Write the format of every matrix as a recipe.",
)
@click.option(
    "--group-size",
    type=OneOf(["32", "64", "128", "0"]),
    help="Weights per scale of q8 and q4; 0 is a whole row.  [default: as the recipe says, else 32]",
)
@click.option(
    "--scales",
    type=OneOf(["absmax", "mse"]),
    help="Scales of q8 and q4: from the largest weight, or of least squared error.  [default: mse with --importance, "
    "else as the recipe says, else mse if any matrix is q4, absmax if not]",
)
@cut_options(experts_default="whole", directory_of="store")
@click.option(
    "--allow-nonfinite",
    is_flag=True,
    help="Pack a checkpoint with NaN or infinite weights: f32 keeps them, other formats store 0.",
)
@click.option(
    "--threads",
    type=Whole(min=1),
    help="Threads of each rank that pack; the bytes do not depend on it.  [default: this host's CPUs / its ranks]",
)
@click.option("--dry-run", is_flag=True, help="Print what the store would take, by part and by node; write no store.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print one JSON object.")
@quiet_option
def shard(**values: Any) -> None:
    """Pack SRC (default: the bundled demo) into a store, a shard per node.

    SRC is a Hugging Face directory, a GGUF file, a QW3W file with its config.json beside it, or the id of a model on
    the Hugging Face hub, such as Qwen/Qwen3-30B-A3B, which is downloaded into the hub's own cache first. A store runs
    on any number of ranks. An interrupted run continues where it stopped when it is repeated. Under mpirun the ranks
    share the files, and threads share each file; all hosts need SRC and -o on one shared file system.
    """
    options = ShardOptions(**values)
    open_origin = checkpoint_opener(options.importance)
    pack_on_ranks(
        lambda team, threads: _lead(options, team, threads), open_origin, options.threads, alone=options.dry_run
    )


def _lead(options: ShardOptions, team: Team, threads: int) -> None:
    """What rank 0 does: check the options, open the model, decide formats, then make the store or show its sizes."""
    from dist_moe.checkpoint.source import open_source
    from dist_moe.cli.calibrated_packing import write_recipe
    from dist_moe.cli.dry_run import show_sizes
    from dist_moe.store.plan import plan_store, source_name

    _refuse_options(options)
    placement = None if options.placement is None else read_cut(Path(options.placement), options.nodes, options.experts)
    path = source_path(options.source, options.quiet)
    _refuse_store(path)
    model, name = open_source(path), source_name(path)
    making = _store_options(options, model, placement, threads)
    formats = making.model_formats(model.config)
    default = default_directory(name, formats.label, making.nodes, placement is not None)
    destination = Path(options.output or default)
    if options.write_recipe is not None:
        write_recipe(Path(options.write_recipe), formats, making.scale_choice(formats), f"of {name}", options.force)
    if options.dry_run:
        show_sizes(plan_store(model, making), model.text_files(), destination, options.as_json)
    else:
        _convert(model, destination, making, team, options.quiet)


def _refuse_options(options: ShardOptions) -> None:
    from dist_moe.cli.calibrated_packing import require_new_recipe

    if options.as_json and not options.dry_run:
        raise UsageError("--json: belongs to --dry-run; add it, or leave out --json")
    if options.write_recipe is not None:
        require_new_recipe(Path(options.write_recipe), options.force)


def _store_options(options: ShardOptions, model: Source, placement: Placement | None, threads: int) -> StoreOptions:
    """Formats, scales and cut; says what the calibration did not reach and what --recipe auto chose."""
    return replace(
        packing_options(model, replace(options, threads=threads)),
        nodes=len(placement.shards) if placement else options.nodes or 1,
        experts=options.experts or "whole",
        placement=placement,
        force=options.force,
        allow_nonfinite=options.allow_nonfinite,
        threads=threads,
    )


def _convert(model: Source, destination: Path, making: StoreOptions, team: Team, quiet: bool) -> None:
    from dist_moe.store.carry import conversion_notes
    from dist_moe.store.convert import convert

    for line in conversion_notes(model, making.model_formats(model.config)):
        click.echo(line, err=True)
    make_store(lambda progress: convert(model, destination, making, progress, team), destination, making.nodes, quiet)


def source_path(source: str | None, quiet: bool) -> Path:
    """Where SRC lies; a model of the Hugging Face hub is downloaded first."""
    from dist_moe.checkpoint.hub import download, is_hub_id
    from dist_moe.demo import demo_model_directory

    if source is None:
        return demo_model_directory()
    if not is_hub_id(source):
        return Path(source)
    with ending_signals_kill():  # a download ends its file first, and goes on in the next run as it is
        return download(source, quiet)


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
