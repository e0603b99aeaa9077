"""`dist-moe profile`: which experts the tokens of a text pick, and which together, into a file for `dist-moe place`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dist_moe.cli import config_file
from dist_moe.cli.config_file import option
from dist_moe.cli.job import Setting, run_job
from dist_moe.cli.models import find_model
from dist_moe.cli.options import ProfileOptions, model_options
from dist_moe.cli.profile_file import write_profile
from dist_moe.cli.texts_to_file import pieces_of_texts, require_output, texts_to_file
from dist_moe.cli.values import Whole
from dist_moe.engine.routing.routing_facts import routing_facts
from dist_moe.engine.routing.routing_profile import ProfileCounter
from dist_moe.engine.routing.routing_record import recorded_routing
from dist_moe.engine.runtime import Runtime
from dist_moe.errors import UsageError

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class ProfileTask:
    """Checked input of the command."""

    pieces: list[list[int]]
    context: int
    origin: str
    model_name: str
    output: Path
    interrupted: Callable[[], bool]

    def lead(self, engine: Runtime) -> None:
        """Read all pieces, and write what was counted."""
        facts = routing_facts(engine.model, self.model_name)
        counter = ProfileCounter(facts)
        with recorded_routing(engine.model, counter.add):
            for piece in self.pieces:
                engine.logits(piece, None, self.interrupted)
        profile = counter.profile(self.origin)
        write_profile(self.output, facts, profile)
        click.echo(
            f"{self.output}: {profile.tokens} tokens, {len(facts.routed_layers)} layers, the picks of "
            f"{profile.sets_LSK.shape[1]} tokens; next: dist-moe place MODEL --nodes N --profile {self.output}",
            err=True,
        )


def make_task(options: ProfileOptions, setting: Setting) -> ProfileTask:
    """Check texts and output before any weight is read.

    Raises:
        UsageError: The model has no experts, or a file cannot be read or written or holds no token.
    """
    if setting.config.experts == 0:
        raise UsageError("profile: this model has no experts: every token reads the same weights; place it without")
    output = Path(options.output)
    require_output(output, options.texts, "text", replace=True)
    context = min(options.ctx, setting.config.max_positions)
    pieces = pieces_of_texts(options.texts, None, setting.text.require_tokenizer(), context)
    origin = ", ".join(Path(name).name for name in options.texts)
    return ProfileTask(pieces, context, origin, find_model(options).name(), output, setting.interrupted)


@click.command()
@model_options
@texts_to_file("OUT.npz", "Where the counts go")
@option("--ctx", type=Whole(min=1), default=DEFAULT_CONTEXT, help="Positions: longer texts are read in such pieces.")
@click.pass_context
def profile(context: click.Context, /, config: str | None, print_config: bool, **values: Any) -> None:
    """Count which experts the tokens of texts pick in each layer, and which fire together, for `dist-moe place`.

    Read what the model will be used for: some ten thousand tokens show which experts are hot.

    \b
    Examples:
      mpirun -n 4 dist-moe profile -m store/ book.txt code.txt -o routing.npz
      dist-moe place store/ --nodes 4 --profile routing.npz -o placement.json
    """  # noqa: D301  click wants the character
    if print_config:
        config_file.print_config(context, {})
        return
    run_job(ProfileOptions(**values), make_task)
