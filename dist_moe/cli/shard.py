"""dist-moe shard: a checkpoint becomes a store."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dist_moe import files
from dist_moe.cli.making_store import cut_options, default_directory, make_store, quiet_option, read_cut
from dist_moe.cli.packing_ranks import checkpoint_opener, pack_on_ranks
from dist_moe.cli.values import Number, OneOf, PathName, Whole
from dist_moe.errors import UsageError

if TYPE_CHECKING:
    from dist_moe.checkpoint.source import Source
    from dist_moe.store.plan import StoreOptions
    from dist_moe.store.team import Team


AUTO = "auto"


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
def shard(
    source: str | None,
    nodes: int | None,
    quant: str | None,
    recipe: str | None,
    importance: str | None,
    target_bits: float | None,
    write_recipe: str | None,
    group_size: str | None,
    scales: str | None,
    experts: str | None,
    placement: str | None,
    output: str | None,
    force: bool,
    allow_nonfinite: bool,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Pack SRC (default: the bundled demo) into a store, a shard per node.

    SRC is a Hugging Face directory, a GGUF file, a QW3W file with its config.json beside it, or the id of a model on
    the Hugging Face hub, such as Qwen/Qwen3-30B-A3B, which is downloaded into the hub's own cache first. A store runs
    on any number of ranks. An interrupted run continues where it stopped when it is repeated. Under mpirun the ranks
    share the files, and threads share each file; all hosts need SRC and -o on one shared file system.
    """
    from dist_moe.checkpoint.source import open_source
    from dist_moe.cli.calibrated_packing import require_new_recipe
    from dist_moe.cli.calibrated_packing import write_recipe as write_formats
    from dist_moe.cli.dry_run import show_sizes
    from dist_moe.store.carry import conversion_notes
    from dist_moe.store.convert import convert
    from dist_moe.store.plan import plan_store, source_name

    def lead(team: Team, own_threads: int) -> None:
        if as_json and not dry_run:
            raise UsageError("--json: belongs to --dry-run; add it, or leave out --json")
        if write_recipe is not None:
            require_new_recipe(Path(write_recipe), force)
        placed = None if placement is None else read_cut(Path(placement), nodes, experts)
        path = source_path(source, quiet)
        _refuse_store(path)
        model = open_source(path)
        shards = len(placed.shards) if placed else nodes or 1
        options = replace(
            packing_options(
                model, Packing(quant, recipe, group_size, scales, importance, target_bits, own_threads, quiet)
            ),
            nodes=shards,
            experts=experts or "whole",
            placement=placed,
            force=force,
            allow_nonfinite=allow_nonfinite,
            threads=own_threads,
        )
        formats = options.model_formats(model.config)
        destination = Path(output or default_directory(source_name(path), formats.label, shards, placed is not None))
        if write_recipe is not None:
            write_formats(Path(write_recipe), formats, options.scale_choice(formats), f"of {source_name(path)}", force)
        if dry_run:
            show_sizes(plan_store(model, options), model.text_files(), destination, as_json)
            return
        for line in conversion_notes(model, formats):
            click.echo(line, err=True)
        make_store(lambda progress: convert(model, destination, options, progress, team), destination, shards, quiet)

    pack_on_ranks(lead, checkpoint_opener(importance), threads, alone=dry_run)


@dataclass(frozen=True)
class Packing:
    """The options that decide formats and scales, as given."""

    quant: str | None
    recipe: str | None
    group_size: str | None
    scales: str | None
    importance: str | None = None
    target_bits: float | None = None
    threads: int | None = None
    quiet: bool = False


def packing_options(model: Source, packing: Packing) -> StoreOptions:
    """Formats and scales of a store of a model, nothing else.

    Raises:
        UsageError: --quant and --recipe are both given, or the recipe or calibration cannot be read or does not fit
            the model, or lacks an option.
    """
    if packing.importance is None:
        _refuse_without_importance(packing)
        return _uncalibrated_options(model, packing)
    from dist_moe.cli.calibrated_packing import DEFAULT_TARGET_BITS, with_auto_recipe, with_importance
    from dist_moe.kernels.formats import ScaleChoice
    from dist_moe.store.auto_recipe import require_choice

    is_auto = packing.recipe == AUTO
    plain = replace(packing, scales=packing.scales or ScaleChoice.MSE.label, recipe=None if is_auto else packing.recipe)
    if is_auto:
        for name, value in (("--quant", packing.quant), ("--group-size", packing.group_size)):
            if value is not None:
                raise UsageError(f"{name} {value}: --recipe auto chooses that; leave out {name} or --recipe")
        if plain.scales != ScaleChoice.MSE.label:
            raise UsageError(f"--scales {plain.scales}: --recipe auto weighs errors of mse; leave out --scales")
        require_choice(model)
    options, calibration = with_importance(_uncalibrated_options(model, plain), model, Path(packing.importance))
    if not is_auto:
        _refuse_target(packing)
        return options
    target = packing.target_bits or DEFAULT_TARGET_BITS
    return with_auto_recipe(options, model, calibration, target, packing.threads or 0, packing.quiet)


def _refuse_without_importance(packing: Packing) -> None:
    if packing.recipe == AUTO:
        raise UsageError(
            "--recipe auto: needs --importance FILE, which says how much errors matter: make one with dist-moe "
            "calibrate TEXT -m STORE --sensitivity 1024 -o FILE"
        )
    _refuse_target(packing)


def _refuse_target(packing: Packing) -> None:
    if packing.target_bits is not None:
        raise UsageError(f"--target-bits {packing.target_bits:g}: belongs to --recipe auto; add it, or leave this out")


def _uncalibrated_options(model: Source, packing: Packing) -> StoreOptions:
    """As `packing_options`, without a calibration."""
    from dist_moe.kernels.formats import ScaleChoice, WeightFormat
    from dist_moe.store.carry import default_format
    from dist_moe.store.plan import StoreOptions
    from dist_moe.store.reader import read_store_manifest
    from dist_moe.store.recipe_file import BUILT_IN, find_recipe

    scales = ScaleChoice.parse(packing.scales) if packing.scales else None
    group = None if packing.group_size is None else int(packing.group_size)
    told: ScaleChoice | None = None
    options = StoreOptions(group_size=StoreOptions.group_size if group is None else group)
    if packing.recipe is None:
        options = replace(options, format=WeightFormat.parse(packing.quant) if packing.quant else default_format(model))
    elif packing.quant is not None:
        raise UsageError(f"--quant {packing.quant}: the recipe says the formats; leave out --quant or --recipe")
    elif packing.recipe not in BUILT_IN and files.is_directory(Path(packing.recipe)):
        if group is not None:
            raise UsageError(f"--group-size {group}: the store says the groups; leave out --group-size or --recipe")
        like = read_store_manifest(Path(packing.recipe))
        told, options = like.scales, replace(options, formats=like.formats, group_size=like.group_size)
    else:
        recipe = find_recipe(packing.recipe)
        told = recipe.scales
        default = next(size for size in (group, recipe.group, StoreOptions.group_size) if size is not None)
        options = replace(options, formats=recipe.formats(model.config, default), group_size=default)
    wanted = told if scales is None else scales
    return options if wanted is None else replace(options, scales=wanted)


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
