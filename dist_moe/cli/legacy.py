"""`dist-moe run STORE STEPS [TRACE]`, the form of a predecessor: greedy steps, compared with a trace."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click
from click.core import ParameterSource

from dist_moe.cli.debug_options import DebugOptions
from dist_moe.cli.options import ModelOptions
from dist_moe.errors import UsageError

FORM = "run STORE STEPS [TRACE]"

# What the predecessor began with when it had no trace; a smaller vocabulary begins with token 0.
START_TOKEN = 12522

_FREE = {
    *(field.name for field in (*fields(ModelOptions), *fields(DebugOptions))),
    *("prompt", "prompt_file", "prompt_ids", "ctx", "logits", "json", "quiet", "show_tokens"),
    *("config", "print_config", "legacy"),
} - {"model"}
_NOT_WITH_TRACE = {"logits", "quiet", "show_tokens"}


def legacy_values(context: click.Context) -> dict[str, Any]:
    """The options that the positional form stands for, over those that it leaves free.

    Args:
        context: Of `run`, parsed, with words in `legacy`.

    Raises:
        UsageError: The words are too few or too many, or an option contradicts them.
    """
    words: tuple[str, ...] = context.params["legacy"]
    if len(words) not in (2, 3):
        plural = "s" if len(words) > 1 else ""
        raise click.UsageError(
            f"Got unexpected extra argument{plural} ({' '.join(words)[:60]}), and {FORM} has two or three words: quote "
            "a text and give it with --prompt",
            context,
        )
    steps = words[1]
    if not (steps.isascii() and steps.isdecimal() and 1 <= int(steps[:12]) <= 2**31 - 1):
        raise UsageError(f"{FORM}: STEPS: expected a whole number from 1 to 2147483647, found {steps[:40]!r}")
    trace = words[2] if len(words) == 3 else None
    _refuse_contradictions(context, trace is not None)
    bound = [parameter for parameter in context.command.params if parameter.name not in _FREE]
    return {str(parameter.name): _default(parameter) for parameter in bound} | {
        "model": words[0],
        "max_tokens": int(steps),
        "ignore_eos": True,
        "greedy": True,
        "expected": trace,
    }


def start_ids(vocabulary: int) -> str:
    """What the form continues without a prompt, as --prompt-ids takes it."""
    return str(START_TOKEN if vocabulary > START_TOKEN else 0)


def _default(parameter: click.Parameter) -> Any:
    """A parameter's value as if nothing had been said of it, not even by a config file."""
    if getattr(parameter, "multiple", False):
        return ()
    value = parameter.default
    return value if isinstance(value, (bool, int, float, str)) else None  # click has a sentinel for "none"


def _refuse_contradictions(context: click.Context, has_trace: bool) -> None:
    for parameter in context.command.params:
        name = str(parameter.name)
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        spelling = max(parameter.opts, key=len)
        if name not in _FREE:
            raise UsageError(
                f"{FORM} takes the model, the number of steps and greedy sampling from its form: leave {spelling} out, "
                "or write the command with options alone"
            )
        if has_trace and name in _NOT_WITH_TRACE:
            raise UsageError(f"{FORM} with a TRACE prints the comparison alone: leave {spelling} out")
