"""What the options of `dist-moe shard` say of formats and scales."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_moe import files
from dist_moe.errors import UsageError

if TYPE_CHECKING:
    from dist_moe.checkpoint.source import Source
    from dist_moe.store.plan import StoreOptions

AUTO = "auto"


@dataclass(frozen=True)
class Packing:
    """The options that decide formats and scales, as given."""

    quant: str | None
    recipe: str | None
    group_size: str | None
    scales: str | None
    importance: str | None
    target_bits: float | None
    threads: int | None
    quiet: bool


def packing_options(model: Source, packing: Packing) -> StoreOptions:
    """Formats and scales of a store of a model, nothing else.

    Raises:
        UsageError: --quant and --recipe are both given, or the recipe or calibration cannot be read or does not fit
            the model, or lacks an option.
    """
    from dist_moe.store.auto_recipe import require_choice

    is_auto = packing.recipe == AUTO
    if is_auto:
        require_choice(model)
    if packing.importance is None:
        _refuse_without_importance(packing)
        return _uncalibrated_options(model, packing)
    from dist_moe.cli.calibrated_packing import DEFAULT_TARGET_BITS, with_auto_recipe, with_importance
    from dist_moe.kernels.formats import ScaleChoice

    plain = replace(packing, scales=packing.scales or ScaleChoice.MSE.label, recipe=None if is_auto else packing.recipe)
    if is_auto:
        for name, value in (("--quant", packing.quant), ("--group-size", packing.group_size)):
            if value is not None:
                raise UsageError(f"{name} {value}: --recipe auto chooses that; leave out {name} or --recipe")
        if plain.scales != ScaleChoice.MSE.label:
            raise UsageError(f"--scales {plain.scales}: --recipe auto weighs errors of mse; leave out --scales")
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
