"""The options of `dist-moe chat`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from dist_moe.cli.config_file import apply, option
from dist_moe.cli.context_options import PromptCacheOptions
from dist_moe.cli.options import ModelOptions
from dist_moe.cli.sampling_options import SamplingChoices
from dist_moe.cli.values import PathName, Whole, YesNo

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

# K and V of so many positions fit beside the weights of every model on any machine that holds those.
DEFAULT_CONTEXT = 32768


@dataclass(frozen=True)
class ChatOptions(ModelOptions, SamplingChoices, PromptCacheOptions):
    """`dist-moe chat`. At most one of `system` and `system_file` is set."""

    ranks: int | None
    hostfile: str | None
    system: str | None
    system_file: str | None
    thinking: str
    show_thinking: bool
    tools: str | None
    load: str | None
    max_tokens: int | None
    ctx: int | None


def chat_options(command: Decorated) -> Decorated:
    """What a chat takes besides a model and its sampling."""
    decorators = (
        option(
            "--ranks",
            type=Whole(min=1, max=65536),
            show_default="1, or what the host file has",
            help="Start so many ranks with the mpirun of this Python's MPI; they end with the chat.",
        ),
        option(
            "--hostfile",
            type=PathName(),
            metavar="FILE",
            show_default=False,
            help="Start them on these hosts; written as that mpirun reads it.",
        ),
        option("--system", metavar="TEXT", show_default=False, help="The system prompt."),
        option(
            "--system-file",
            type=PathName(),
            metavar="FILE",
            show_default=False,
            help="A file with the system prompt, UTF-8; one newline at its end is dropped.",
        ),
        option(
            "--thinking",
            metavar="on|off|auto|TOKENS",
            default="auto",
            help="Whether the model thinks before it answers, or how many tokens of thinking it may spend; auto: as "
            "its chat template does by itself.",
        ),
        option(
            "--show-thinking/--hide-thinking",
            type=YesNo(),
            default=True,
            show_default="shown, dim on a terminal",
            help="Print the thinking, or only that there is some.",
        ),
        option(
            "--tools",
            type=PathName(),
            metavar="FILE.json",
            show_default=False,
            help="Functions that the model may call, a list in OpenAI's form; you are asked for the results.",
        ),
        option(
            "--load",
            type=PathName(),
            metavar="FILE.json",
            show_default=False,
            help="Go on with a conversation that /save wrote.",
        ),
        option(
            "-n",
            "--max-tokens",
            type=Whole(min=1, max=2**31 - 1),
            show_default="what the context takes",
            help="Tokens of an answer at most, its thinking included.",
        ),
        option(
            "--ctx",
            type=Whole(min=1, max=2**31 - 1),
            show_default=f"{DEFAULT_CONTEXT}, or the model's maximum if that is less",
            help="Positions of the conversation and the answer together.",
        ),
    )
    return apply(command, decorators)
