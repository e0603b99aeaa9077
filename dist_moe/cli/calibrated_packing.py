"""What `shard` makes of a calibration: the importance of columns, and recipes that fit a number of bits."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from dist_moe import files
from dist_moe.checkpoint.source import Source
from dist_moe.cli.coverage import coverage_lines
from dist_moe.cli.shard_progress import ShardProgress
from dist_moe.errors import UsageError
from dist_moe.files import NewFile
from dist_moe.kernels import Kernels
from dist_moe.kernels.formats import MatrixFormat, ScaleChoice
from dist_moe.store.auto_recipe import auto_recipe
from dist_moe.store.calibrated import CalibratedImportance
from dist_moe.store.calibration import Calibration
from dist_moe.store.calibration_file import read_calibration, require_model
from dist_moe.store.formats import ATTENTION_KEYS, ModelFormats, format_label
from dist_moe.store.plan import StoreOptions, source_name
from dist_moe.store.recipe_text import recipe_text

DEFAULT_TARGET_BITS = 4.5


def with_importance(options: StoreOptions, model: Source, path: Path) -> tuple[StoreOptions, Calibration]:
    """Options that weight the search for scales, and the calibration; says which experts it did not reach.

    Raises:
        UsageError: The file cannot be read, or is of another model.
    """
    calibration = read_calibration(path)
    require_model(path, calibration, model.config, source_name(model.path), model.fingerprint())
    for line in coverage_lines(calibration):
        click.echo(f"{path}: {line}", err=True)
    return replace(options, importance=CalibratedImportance(calibration)), calibration


def with_auto_recipe(
    options: StoreOptions, model: Source, calibration: Calibration, target_bits: float, threads: int, quiet: bool
) -> StoreOptions:
    """Options with the formats of least expected divergence at a number of bits per weight; prints them.

    Raises:
        UsageError: The calibration has no sensitivities, or the model cannot have so few bits.
    """
    with Kernels(threads or len(os.sched_getaffinity(0))) as kernels, ShardProgress(quiet) as progress:
        found = auto_recipe(
            model,
            calibration,
            target_bits,
            kernels,
            lambda done, total: progress(done, total, "measuring rounding errors"),
        )
    for line in table_lines(found.formats):
        click.echo(line, err=True)
    click.echo(
        f"auto: {found.bits_per_weight:.4f} bits per weight (at most {target_bits:g}); expected divergence "
        f"{found.cost:.3e} nats per token, {found.uniform_cost:.3e} with {format_label(found.uniform)} throughout",
        err=True,
    )
    importance = options.importance if found.formats.quantized else None  # bf16 throughout has no scales to weight
    return replace(options, formats=found.formats, importance=importance)


def table_lines(formats: ModelFormats) -> list[str]:
    """The format of each kind of matrix, a line per layer; experts are counted where they differ."""
    rows = [["layer", *ATTENTION_KEYS, "gate_up", "down"]]
    for number, layer in enumerate(formats.layers):
        attention = [format_label(getattr(layer, key)) for key in ATTENTION_KEYS]
        rows.append([str(number), *attention, _counted(layer.gate_up), _counted(layer.down)])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, f"lm_head  {format_label(formats.lm_head)}"]


def write_recipe(path: Path, formats: ModelFormats, scales: ScaleChoice, comment: str, force: bool) -> None:
    """Write formats as a recipe in TOML.

    Raises:
        UsageError: The file is there already, or cannot be written.
    """
    require_new_recipe(path, force)
    with NewFile(path) as file:
        file.write(recipe_text(formats, scales, comment).encode())
        file.commit()
    click.echo(f"{path}: the recipe; dist-moe shard --recipe {path} takes it", err=True)


def require_new_recipe(path: Path, force: bool) -> None:
    """Refuse a file that would be replaced; UsageError."""
    if files.exists(path) and not force:
        raise UsageError(f"--write-recipe {path}: is there already: name another file, or replace it with --force")


def _counted(formats: Sequence[MatrixFormat]) -> str:
    counts = Counter(map(format_label, formats))
    return ", ".join(label if len(counts) == 1 else f"{count} {label}" for label, count in sorted(counts.items()))
