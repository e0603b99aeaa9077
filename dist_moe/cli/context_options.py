"""The options about what a run starts from: a saved prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from dist_moe.cli.config_file import flag, option
from dist_moe.cli.values import PathName

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@dataclass(frozen=True)
class ContextOptions:
    """Where K and V of the prompt are kept from one run to the next."""

    prompt_cache: str | None
    prompt_cache_ro: bool
    prompt_cache_all: bool


def context_options(command: Decorated) -> Decorated:
    """`--prompt-cache` and what goes with it."""
    decorators = (
        option(
            "--prompt-cache",
            type=PathName(),
            metavar="FILE",
            show_default=False,
            help="Keep what the prompt computed in this file: a later prompt that begins alike, with the same model, "
            "on any number of ranks, computes only what is new. Refused if the model, --kv or the numbers differ.",
        ),
        flag("--prompt-cache-ro", "Read the --prompt-cache, and leave it as it is."),
        flag("--prompt-cache-all", "Save the generated text in the --prompt-cache, too, not the prompt alone."),
    )
    for decorate in reversed(decorators):
        command = decorate(command)
    return command
