"""The options about the context: how far it reaches, and the saved prompt that it begins with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from dist_moe.cli.config_file import apply, flag, option
from dist_moe.cli.values import PathName, refuse
from dist_moe.errors import UsageError
from dist_moe.store.rope_scaling import FORM, RopeScaling

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@dataclass(frozen=True)
class PromptCacheOptions:
    """Where K and V are kept from one run to the next."""

    prompt_cache: str | None
    prompt_cache_ro: bool


@dataclass(frozen=True)
class ContextOptions(PromptCacheOptions):
    """And whether those of the answer are."""

    prompt_cache_all: bool


class _Scaling(click.types.StringParamType):
    """A `RopeScaling`; the value stays a text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = super().convert(value, param, ctx)
        try:
            RopeScaling.parse(text)
        except UsageError:
            refuse(f"{FORM}, with a factor above 1", value, param, ctx)
        return text


def rope_scaling_option() -> Callable[[Decorated], Decorated]:
    """`--rope-scaling`."""
    return option(
        "--rope-scaling",
        type=_Scaling(),
        metavar="yarn:FACTOR[:ORIGINAL]",
        show_default="as the model's config.json says",
        help="Stretch the context by YaRN to FACTOR times ORIGINAL positions (else: times the model's maximum; for "
        "the first Qwen3 models, take yarn:4:32768). Changes the numbers of all prompts, short ones too.",
    )


def context_options(command: Decorated) -> Decorated:
    """`--prompt-cache` and what goes with it where one prompt is continued."""
    whole = flag("--prompt-cache-all", "Save the generated text in the --prompt-cache, too, not the prompt alone.")
    return prompt_cache_options(whole(command))


def prompt_cache_options(command: Decorated) -> Decorated:
    """`--prompt-cache` and `--prompt-cache-ro`."""
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
    )
    return apply(command, decorators)
