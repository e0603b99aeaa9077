"""The options that look into a run: which experts its tokens pick, and where its time and its bytes go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click
import click.shell_completion

from dist_moe.cli.config_file import flag, option
from dist_moe.cli.values import PathName, refuse

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

DEBUG_WORDS = ("routing", "timing")


@dataclass(frozen=True)
class DebugOptions:
    """What `run` and `logits` show and write about themselves. `debug` is a list such as "routing,timing"."""

    debug: str | None
    routing: str | None
    stats: bool
    trace: str | None


class _Words(click.types.StringParamType):
    """Some of a few words with commas between them."""

    def __init__(self, known: tuple[str, ...]) -> None:
        self._known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        words = [word.strip() for word in super().convert(value, param, ctx).split(",")]
        if not all(word in self._known for word in words):
            refuse(f"{' or '.join(self._known)}, with commas between several", value, param, ctx)
        return ",".join(words)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        return [click.shell_completion.CompletionItem(word) for word in self._known if word.startswith(incomplete)]


class _Repeatable(click.Option):
    """An option that may be repeated; in a config file and in the environment it is one text."""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Take the text of a config file as the one value that it is."""
        return super().type_cast_value(ctx, (value,) if isinstance(value, str) else value)

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """The variable's text, blanks and all."""
        return self.resolve_envvar_value(ctx)


def debug_options(command: Decorated) -> Decorated:
    """`--debug`, `--routing`, `--stats` and `--trace`."""
    command = flag(
        "--stats",
        "Print at the end, on stderr, what each rank computed, waited for and sent per token, how unevenly the experts "
        "fell on the ranks, and what limits.",
    )(command)
    command = option(
        "--trace",
        type=PathName(),
        metavar="FILE.json",
        show_default=False,
        help="Write what each rank did when, as a Chrome trace; ui.perfetto.dev shows it.",
    )(command)
    command = option(
        "--routing",
        type=PathName(),
        metavar="OUT.npz",
        show_default=False,
        help="Write which experts each token picked in each layer, with their weights; `dist-moe routing` reads it.",
    )(command)
    return option(
        "--debug",
        cls=_Repeatable,
        type=_Words(DEBUG_WORDS),
        metavar="WORDS",
        multiple=True,
        callback=lambda _, __, values: ",".join(values) or None,
        show_default=False,
        help="routing: each token's experts and weights per layer; timing: milliseconds of each step by part, and a "
        "table at the end. On stderr, as rank 0 sees it; several with commas.",
    )(command)
