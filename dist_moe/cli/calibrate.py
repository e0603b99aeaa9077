"""`dist-moe calibrate`: what a text drives through each matrix, into a file that weights `shard`'s rounding errors."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dist_moe.cli import config_file
from dist_moe.cli.config_file import flag, option
from dist_moe.cli.coverage import coverage_lines
from dist_moe.cli.documents import split_option
from dist_moe.cli.job import Setting, run_job
from dist_moe.cli.models import find_model
from dist_moe.cli.options import ModelOptions, model_options
from dist_moe.cli.output_files import require_apart
from dist_moe.cli.texts_to_file import pieces_of_texts, require_output, texts_to_file
from dist_moe.cli.values import Whole
from dist_moe.engine.calibrating import calibrate as sum_over_texts
from dist_moe.engine.calibrating import measure_sensitivity
from dist_moe.engine.runtime import Runtime
from dist_moe.errors import UsageError
from dist_moe.kernels.formats import WeightFormat
from dist_moe.parallel.launcher import detect_launcher
from dist_moe.store.calibration import Calibration
from dist_moe.store.calibration_file import merge_files, write_calibration
from dist_moe.store.reader import read_store_manifest

DEFAULT_WINDOW = 2048
_LINE_EVERY_S = 5.0


@dataclass(frozen=True)
class CalibrateOptions(ModelOptions):
    """`dist-moe calibrate`."""

    texts: tuple[str, ...]
    output: str
    window: int | None
    split: str | None
    sensitivity: int | None
    merge: bool
    force: bool


@dataclass(frozen=True)
class CalibrateTask:
    """Checked input of the command."""

    pieces: list[list[int]]
    texts: list[str]
    context: int
    sensitivity: int | None
    output: Path
    interrupted: Callable[[], bool]

    def lead(self, engine: Runtime) -> None:
        """Read all pieces, and write what their tokens drove through the matrices."""
        sums = sum_over_texts(engine, self.pieces, self.interrupted, _Told("tokens read"))
        calibration = dataclasses.replace(sums, texts=tuple(sorted(set(self.texts))))
        if self.sensitivity is not None:
            pieces = first_tokens(self.pieces, self.sensitivity)
            calibration = measure_sensitivity(
                engine, calibration, pieces, self.interrupted, _Told("groups of matrices rounded")
            )
        write_calibration(self.output, calibration)
        report(self.output, calibration)


def make_task(options: CalibrateOptions, setting: Setting) -> CalibrateTask:
    """Check texts and output before any weight is read.

    Raises:
        UsageError: A file cannot be read or written, is there already, or holds no token.
        CheckpointError: The model has no tokenizer.
    """
    output, config = Path(options.output), setting.config
    require_output(output, options.texts, "text", replace=options.force)
    require_apart(options, setting.directory)
    _require_finer_than_q4(options)
    window = options.window or min(DEFAULT_WINDOW, config.max_positions)
    if window > config.max_positions:
        raise UsageError(
            f"--window {window} is more than the model's maximum of {config.max_positions} positions: lower it"
        )
    tokenizer = setting.text.require_tokenizer()
    pieces = pieces_of_texts(options.texts, options.split, tokenizer, window)
    texts = [Path(name).name for name in options.texts]
    return CalibrateTask(pieces, texts, max(map(len, pieces)), options.sensitivity, output, setting.interrupted)


def first_tokens(pieces: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """The first pieces with so many tokens together, the last one cut; fewer if there are fewer."""
    found: list[list[int]] = []
    for piece in pieces:
        if tokens > 0:
            found.append(piece[:tokens])
            tokens -= len(found[-1])
    return found


class _Told:
    """Says on stderr how far a long reading is, every few seconds."""

    def __init__(self, what: str) -> None:
        self._what, self._next_s = what, time.monotonic() + _LINE_EVERY_S

    def __call__(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + _LINE_EVERY_S
            click.echo(f"{done} of {total} {self._what}", err=True)


def _require_finer_than_q4(options: CalibrateOptions) -> None:
    """Refuse to round to q4 what is q4 already: nothing would change, and --recipe auto would think it free."""
    if options.sensitivity is None:
        return
    model = find_model(options)
    formats = {model.format}
    if model.format is None:
        formats = {found.format for found in read_store_manifest(model.path).formats.distinct}
    if WeightFormat.Q4 in formats:
        raise UsageError(
            f"--sensitivity: {model.path} has matrices in q4 already, whose rounding cannot be measured: take a store "
            "in bf16 (dist-moe shard --quant bf16), or --quant bf16"
        )


def report(output: Path, calibration: Calibration) -> None:
    """Say what was written, and which experts the texts did not reach."""
    for line in coverage_lines(calibration):
        click.echo(line, err=True)
    click.echo(
        f"{output}: {calibration.tokens} tokens of {', '.join(calibration.texts)}; next: dist-moe shard SRC "
        f"--scales mse --importance {output}",
        err=True,
    )


@click.command()
@model_options
@texts_to_file("FILE", "Where the sums go (a safetensors file)")
@option(
    "--window",
    type=Whole(min=1),
    show_default=f"{DEFAULT_WINDOW}, or the model's maximum",
    help="Positions: longer documents are read in such pieces.",
)
@split_option
@option(
    "--sensitivity",
    metavar="TOKENS",
    type=Whole(min=1),
    show_default="not measured",
    help="Also measure with the texts' first TOKENS tokens (1024, say) what rounding each layer's q, k, v, o, gate and "
    "up, down, and lm_head alone to q4 does to the predictions, for shard --recipe auto. Reads them 6 times per layer; "
    "keeps 4 bytes x vocabulary per token.",
)
@flag("--merge", "The files are calibrations of one model, not texts: add them up.")
@flag("--force", "Replace FILE if it is there.")
@click.pass_context
def calibrate(context: click.Context, /, config: str | None, print_config: bool, **values: Any) -> None:
    """Sum up over texts the squares of what each column of each matrix is multiplied with, and count experts.

    `dist-moe shard --importance FILE` weights rounding errors with it. Read what the model will be used for, in a store
    with exact weights (--quant bf16); the same bytes on any number of ranks.

    \b
    Examples:
      mpirun -n 4 dist-moe calibrate -m store-bf16/ book.txt code.txt -o model.calibration
      dist-moe calibrate --merge one.calibration two.calibration -o model.calibration
    """  # noqa: D301  click wants the character
    if print_config:
        config_file.print_config(context, {})
        return
    options = CalibrateOptions(**values)
    if options.merge and (given := [name for name in ("window", "split", "sensitivity", "model") if values.get(name)]):
        raise UsageError(f"--merge adds up files that are there: leave --{given[0]} out")
    if options.exchange == "alltoall":
        raise UsageError("--exchange alltoall: calibrate needs all tokens on all ranks: leave it out")
    if not options.merge:
        run_job(dataclasses.replace(options, exchange="allreduce"), make_task)
    elif detect_launcher(os.environ).is_first:
        output = Path(options.output)
        require_output(output, options.texts, "calibration", replace=options.force)
        merged = merge_files([Path(name) for name in options.texts])
        write_calibration(output, merged)
        report(output, merged)
