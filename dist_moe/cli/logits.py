"""`dist-moe logits`: the logits at every position of a list of tokens, into a .npy file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dist_moe.cli import config_file
from dist_moe.cli.config_file import option
from dist_moe.cli.debug_options import debug_options
from dist_moe.cli.job import Setting, run_job
from dist_moe.cli.models import find_model
from dist_moe.cli.npy_rows import NpyRows
from dist_moe.cli.options import LogitsOptions, model_options
from dist_moe.cli.output_files import require_apart
from dist_moe.cli.probes import Probes, make_probes
from dist_moe.cli.prompt import require_room
from dist_moe.cli.token_ids import read_ids, require_ids
from dist_moe.cli.values import PathName
from dist_moe.engine.engine import Engine
from dist_moe.files import require_writable


@dataclass(frozen=True)
class LogitsTask:
    """Checked input of the command."""

    ids: list[int]
    output: Path
    probes: Probes
    interrupted: Callable[[], bool]

    @property
    def context(self) -> int:
        """One position per token."""
        return len(self.ids)

    def lead_engine(self, engine: Engine) -> None:
        """Stream the rows to the file."""
        with NpyRows(self.output, engine.config.vocabulary) as rows, self.probes.attached(engine.runtime):
            engine.logits(self.ids, rows.append, self.interrupted)
        self.probes.report()


def make_task(options: LogitsOptions, setting: Setting) -> LogitsTask:
    """Check ids and output before any weight is read.

    Raises:
        UsageError: An id that the model lacks, more ids than positions, or a file that cannot be written.
    """
    require_apart(options, setting.directory)
    ids = read_ids(options.ids, "--ids")
    require_ids(ids, setting.config.vocabulary, "--ids")
    require_room(len(ids), setting.config.max_positions, setting.config.max_positions)
    output = Path(options.output)
    require_writable(output)
    probes = make_probes(options, setting.config, lambda: find_model(options).name(), "[{}]".format)
    return LogitsTask(ids, output, probes, setting.interrupted)


@click.command()
@model_options
@option(
    "--ids",
    type=PathName("token ids like 1,2,3 or the name of a file"),
    metavar="FILE|LIST",
    required=True,
    show_default=False,
    help="Tokens: 1,2,3, a text file or a .npy.",
)
@option(
    "-o",
    "--output",
    type=PathName(),
    metavar="OUT.npy",
    required=True,
    show_default=False,
    help="Where the logits go, float32 [tokens, vocabulary]; written under another name until it is whole.",
)
@debug_options
@click.pass_context
def logits(context: click.Context, /, config: str | None, print_config: bool, **values: Any) -> None:
    """Write the logits at every position of a list of tokens; needs no tokenizer."""
    if print_config:
        config_file.print_config(context, {})
        return
    run_job(LogitsOptions(**values), make_task)
