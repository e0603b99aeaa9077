"""The prompt of a run: where its text comes from, and its tokens."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from dist_moe.cli.options import RunOptions
from dist_moe.cli.text_files import decode, read_limited, read_text
from dist_moe.cli.token_ids import parse_ids, require_ids
from dist_moe.errors import UsageError
from dist_moe.parallel.launcher import Launcher
from dist_moe.text.tokenizer import TOKENIZER_FILE, Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue, and their text (empty if there is no tokenizer)."""

    ids: tuple[int, ...]
    text: str


def read_prompt(options: RunOptions, tokenizer: Tokenizer | None, vocabulary: int, launcher: Launcher) -> Prompt:
    """The prompt that the options name, as tokens of the model.

    Args:
        options: One of `prompt`, `prompt_file` and `prompt_ids` is set.
        tokenizer: Needed unless the prompt is given as ids.
        vocabulary: Rows of the model's embedding table.
        launcher: Who started us, which decides whether stdin can be read.

    Raises:
        UsageError: The prompt cannot be read, is empty, or has ids that the model lacks.
    """
    if options.prompt_ids is not None:
        ids = parse_ids(options.prompt_ids, "--prompt-ids")
        require_ids(ids, vocabulary, "--prompt-ids")
        return Prompt(tuple(ids), tokenizer.decode(ids) if tokenizer else "")
    assert tokenizer is not None
    text = _read_text(options, launcher)
    ids = tokenizer.encode(text)
    if not ids and tokenizer.bos_id is None:
        raise UsageError("the prompt is empty and this model has no token that begins a text: give some text")
    ids = ids or [int(tokenizer.bos_id or 0)]
    require_ids(ids, vocabulary, f"the prompt's tokens ({TOKENIZER_FILE} does not fit this model)")
    return Prompt(tuple(ids), text)


def require_context(ctx: int | None, max_positions: int) -> None:
    """Refuse a context beyond the model's.

    Raises:
        UsageError: --ctx is more than the model's maximum.
    """
    if ctx is not None and ctx > max_positions:
        raise UsageError(f"--ctx {ctx} is more than the model's maximum of {max_positions} positions: lower it")


def require_room(prompt_tokens: int, context: int, max_positions: int) -> None:
    """Refuse a prompt that is longer than the context.

    Args:
        prompt_tokens: Tokens of the prompt.
        context: Positions of this run, as --ctx or the model limits them.
        max_positions: The model's own limit.

    Raises:
        UsageError: The prompt is longer than the context.
    """
    if prompt_tokens <= context:
        return
    origin = "--ctx" if context < max_positions else "the model's maximum"
    fits = prompt_tokens <= max_positions
    advice = f" or raise --ctx, up to the model's maximum of {max_positions}" if fits else ""
    raise UsageError(
        f"the prompt has {prompt_tokens} tokens, but the context has {context} positions ({origin}): "
        f"shorten the prompt{advice}"
    )


def _read_text(options: RunOptions, launcher: Launcher) -> str:
    if options.prompt_file is not None:
        return read_text(Path(options.prompt_file), "--prompt-file").removesuffix("\n")
    assert options.prompt is not None
    return options.prompt if options.prompt != "-" else _read_stdin(launcher)


def _read_stdin(launcher: Launcher) -> str:
    if launcher.name == "openmpi":
        raise UsageError("-p - cannot be used under Open MPI, whose mpirun never ends stdin: use --prompt-file FILE")
    if launcher.size > 1:
        logger.warning("reading the prompt from stdin; above 64 KB mpirun may end the job, so prefer --prompt-file")
    return decode(read_limited(sys.stdin.buffer, "stdin"), "stdin").removesuffix("\n")
