"""`dist-moe run`: continue a text."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from dist_moe.cli import config_file
from dist_moe.cli.job import Setting, run_job
from dist_moe.cli.models import find_model
from dist_moe.cli.npy_rows import NpyRows, require_writable
from dist_moe.cli.options import RunOptions, model_options, output_options, prompt_options
from dist_moe.cli.output import Output
from dist_moe.cli.prompt import Prompt, read_prompt, read_tokenizer, require_room
from dist_moe.cli.sampling import advised_values
from dist_moe.cli.sampling import sampling_options as chosen_sampling
from dist_moe.cli.sampling_options import continuation_options, sampling_options
from dist_moe.engine.request import Completion, Request
from dist_moe.engine.runtime import Runtime
from dist_moe.errors import Interrupted, StoreError, UsageError
from dist_moe.text.generation_config import read_generation_config
from dist_moe.text.tokenizer import Tokenizer

PROMPTS = ("prompt", "prompt_file", "prompt_ids")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunTask:
    """A checked prompt and what becomes of it."""

    request: Request
    prompt: Prompt
    context: int
    valid_vocabulary: int
    output: Output
    logits: Path | None
    interrupted: Callable[[], bool]

    def lead(self, engine: Runtime) -> None:
        """Generate, print, and write the logits.

        Raises:
            StoreError: The model's numbers overflowed.
            Interrupted: By Ctrl-C; what was made is printed.
        """
        self.output.begin(self.prompt)
        completion = self._generate(engine)
        self.output.end(self.prompt, completion, engine.statistics())
        if completion.finish_reason == "interrupted":
            raise Interrupted(f"interrupted after {len(completion.ids)} tokens")
        if completion.finish_reason == "error":
            raise StoreError(
                f"the text ended after {len(completion.ids)} tokens: {completion.error}: "
                "the weights are damaged (see dist-moe inspect --verify) or this text overflows the model"
            )

    def _generate(self, engine: Runtime) -> Completion:
        with ExitStack() as stack:
            request = self.request
            if self.logits is not None:
                rows = stack.enter_context(NpyRows(self.logits, engine.config.vocabulary))
                request = replace(request, on_logits=lambda logits_V: rows.append(logits_V[np.newaxis]))
            (completion,) = engine.generate([request], self.output.token, self.valid_vocabulary, self.interrupted)
        return completion


def make_task(options: RunOptions, setting: Setting) -> RunTask:
    """Check the prompt and the outputs before any weight is read.

    Raises:
        UsageError: The prompt or an option does not fit the model.
        CheckpointError: The model's tokenizer or generation settings cannot be used.
    """
    config, advised = setting.config, read_generation_config(setting.directory)
    tokenizer = read_tokenizer(setting.directory, required=options.prompt_ids is None)
    prompt = read_prompt(options, tokenizer, config.vocabulary, setting.launcher)
    context = context_size(options, len(prompt.ids), config.max_positions)
    stop_ids = known_stop_ids(advised.stop_ids, tokenizer, config.vocabulary)
    if options.logits is not None:
        require_writable(Path(options.logits))
    request = Request(
        prompt_ids=prompt.ids,
        max_tokens=options.max_tokens,
        sampling=chosen_sampling(options, advised, tokenizer, config.vocabulary),
        stop_ids=frozenset() if options.ignore_eos else stop_ids,
    )
    return RunTask(
        request=request,
        prompt=prompt,
        context=context,
        valid_vocabulary=min(config.vocabulary, tokenizer.size if tokenizer else config.vocabulary),
        output=Output(options, tokenizer, stop_ids),
        logits=Path(options.logits) if options.logits is not None else None,
        interrupted=setting.interrupted,
    )


def known_stop_ids(advised: frozenset[int], tokenizer: Tokenizer | None, vocabulary: int) -> frozenset[int]:
    """The tokens that end a text, as the model's files and its tokenizer say; those that it lacks are said and ignored.

    Args:
        advised: From generation_config.json and config.json.
        tokenizer: Its end token is one, too.
        vocabulary: Rows of the model's embedding table.
    """
    named = advised if tokenizer is None or tokenizer.eos_id is None else advised | {tokenizer.eos_id}
    unknown = sorted(token for token in named if not 0 <= token < vocabulary)
    if unknown:
        logger.warning(
            "eos_token_id %s of the model's files is ignored: its vocabulary is 0 to %d",
            ", ".join(map(str, unknown)),
            vocabulary - 1,
        )
    return named - set(unknown)


def context_size(options: RunOptions, prompt_tokens: int, max_positions: int) -> int:
    """Positions of the run's context.

    Raises:
        UsageError: --ctx is more than the model's maximum, or the prompt does not fit.
    """
    if options.ctx is not None and options.ctx > max_positions:
        raise UsageError(f"--ctx {options.ctx} is more than the model's maximum of {max_positions} positions: lower it")
    context = options.ctx or min(max_positions, prompt_tokens + options.max_tokens)
    require_room(prompt_tokens, context, max_positions)
    return context


@click.command()
@prompt_options
@model_options
@sampling_options
@continuation_options
@output_options
@click.pass_context
def run(context: click.Context, /, config: str | None, print_config: bool, **values: Any) -> None:
    """Continue a text.

    Each option can also be set as DIST_MOE_<NAME> in the environment and in a --config file.
    """
    _keep_one_prompt(context)
    options = RunOptions(**(values | {name: context.params[name] for name in PROMPTS}))
    if print_config:
        source = find_model(options)
        if source.format is None:
            source.read_config()
        advised = read_generation_config(source.text_directory())
        config_file.print_config(context, advised_values(advised))
        return
    if not any(context.params[name] is not None for name in PROMPTS):
        raise UsageError("there is nothing to continue: give --prompt TEXT, --prompt-file FILE or --prompt-ids 1,2,3")
    run_job(options, make_task)


def _keep_one_prompt(context: click.Context) -> None:
    """Forget the prompts of weaker places: a flag replaces the kind of prompt that a config file names."""
    chosen = config_file.strongest(context, PROMPTS)
    if len(chosen) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in chosen)
        raise UsageError(f"{names} exclude each other: give one of them")
    context.params.update({name: None for name in PROMPTS if name not in chosen})
