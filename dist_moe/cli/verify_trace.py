"""dist-moe verify trace: greedy steps against a reference that transformers made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import click

from dist_moe.cli import config_file
from dist_moe.cli.debug_options import DebugOptions, debug_options
from dist_moe.cli.job import Setting, run_job
from dist_moe.cli.models import find_model
from dist_moe.cli.options import ModelOptions, model_options
from dist_moe.cli.output_files import require_apart
from dist_moe.cli.probes import make_probes
from dist_moe.cli.prompt import require_room
from dist_moe.cli.reference_file import read_reference
from dist_moe.cli.reference_trace import Tolerances, TraceTask
from dist_moe.cli.token_lines import token_line
from dist_moe.cli.values import Number, OneOf, PathName, Whole


@dataclass(frozen=True)
class TraceOptions(ModelOptions, DebugOptions):
    """`dist-moe verify trace`."""

    reference: str
    steps: int | None
    logit_rmse: float | None
    prob_mae: float | None
    mismatches: int
    format: str


def make_task(options: TraceOptions, setting: Setting) -> TraceTask:
    """Check a reference, and whether it is of this model, before any weight is read.

    Raises:
        UsageError: It is not, or cannot be read.
    """
    require_apart(options, setting.directory)
    config = setting.config
    reference = read_reference(options.reference, options.steps, config)
    steps = options.steps or len(reference.expected_ids)
    context = len(reference.prompt_ids) + steps - 1
    require_room(context, config.max_positions, config.max_positions)
    return TraceTask(
        name=options.reference,
        trace=reference,
        steps=steps,
        context=context,
        valid_vocabulary=setting.text.valid_vocabulary,
        as_json=options.format == "json",
        probes=make_probes(
            options, config, lambda: find_model(options).name(), partial(token_line, setting.text.tokenizer)
        ),
        interrupted=setting.interrupted,
        tolerances=Tolerances(options.mismatches, options.logit_rmse, options.prob_mae),
    )


@click.command()
@click.argument("reference", type=PathName())
@model_options
@click.option("--steps", type=Whole(min=1), show_default="all", help="Steps that are compared.")
@click.option(
    "--logit-rmse",
    metavar="X",
    type=Number(min=0),
    show_default=False,
    help="The largest root mean square error of a step's logits that passes; ungiven they decide nothing.",
)
@click.option(
    "--prob-mae",
    metavar="X",
    type=Number(min=0),
    show_default=False,
    help="The largest mean absolute error of a step's probabilities that passes; ungiven they decide nothing.",
)
@click.option(
    "--mismatches",
    type=Whole(min=0),
    default=0,
    show_default=True,
    help="How many steps may give another token: weights that were rounded decide near ties otherwise.",
)
@click.option("-o", "format", type=OneOf(["text", "json"]), default="text", help="Lines, or one JSON object.")
@debug_options
@click.pass_context
def trace(context: click.Context, /, config: str | None, print_config: bool, **values: Any) -> None:
    """Compare greedy steps with a REFERENCE: per step the expected token, ours, and how far logits are off.

    REFERENCE is a file of tools/make_reference.py, a directory with one, or the base name of a predecessor's
    .ids.npy, .logits.npy and .probs.npy. Each step continues the reference's own tokens. Exit code 0 if all steps
    pass, else 2. Works on any number of ranks.

    \b
    Examples:
      dist-moe verify trace reference.npz
      mpirun -n 4 dist-moe verify trace reference.npz -m model-q4 --mismatches 2 --prob-mae 1e-4
    """  # noqa: D301  click wants the character
    if print_config:
        config_file.print_config(context, {})
        return
    run_job(TraceOptions(**values), make_task)
