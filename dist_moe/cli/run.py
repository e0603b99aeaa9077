"""`dist-moe run`: continue a text."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from dist_moe.cli import config_file
from dist_moe.cli.context_options import context_options
from dist_moe.cli.debug_options import debug_options
from dist_moe.cli.job import EngineTask, Setting, Task, run_job
from dist_moe.cli.legacy import legacy_values, start_ids
from dist_moe.cli.models import find_model
from dist_moe.cli.npy_rows import NpyRows
from dist_moe.cli.options import RunOptions, model_options, output_options, prompt_options
from dist_moe.cli.output import Output
from dist_moe.cli.output_files import require_apart
from dist_moe.cli.probes import Probes, make_probes
from dist_moe.cli.prompt import Prompt, read_prompt, require_context, require_room
from dist_moe.cli.reference_trace import TraceTask, read_trace
from dist_moe.cli.sampling import advised_values
from dist_moe.cli.sampling import sampling_options as chosen_sampling
from dist_moe.cli.sampling_options import continuation_options, sampling_options
from dist_moe.cli.saved_prompt import SavedPrompt, read_saved_prompt
from dist_moe.cli.several import SeveralTask, overflow_error, wants_several
from dist_moe.cli.token_lines import token_line
from dist_moe.cli.values import PathName, unescape
from dist_moe.engine.engine import Engine
from dist_moe.engine.requests.pieces import Result
from dist_moe.engine.requests.request import SamplingOptions
from dist_moe.errors import Interrupted, UsageError
from dist_moe.files import require_writable
from dist_moe.kernels import KvFormat
from dist_moe.model_config import ModelConfig
from dist_moe.store.manifest import Manifest
from dist_moe.text.generation_config import read_generation_config
from dist_moe.text.tokenizer import Tokenizer

PROMPTS = ("prompt", "prompt_file", "prompt_ids")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunTask:
    """A checked prompt and what becomes of it."""

    prompt: Prompt
    max_tokens: int
    sampling: SamplingOptions
    stop: tuple[str, ...]
    ignore_eos: bool
    context: int
    output: Output
    logits: Path | None
    probes: Probes
    interrupted: Callable[[], bool]
    saved: SavedPrompt | None = None

    def accept(self, manifest: Manifest, kv: KvFormat) -> None:
        """Refuse a prompt cache of another store."""
        if self.saved is not None:
            self.saved.check(manifest, kv)

    def lead_engine(self, engine: Engine) -> None:
        """Generate, print, and write the logits.

        Raises:
            StoreError: The model's numbers overflowed.
            Interrupted: By Ctrl-C; what was made is printed.
        """
        if self.saved is not None:
            self.saved.restore(engine.runtime, self.prompt.ids)
        self.output.begin(self.prompt)
        result = self._generate(engine)
        self.output.end(self.prompt, result, engine.statistics(), self.probes.ranks)
        if self.saved is not None:
            self.saved.save(engine.runtime, self.prompt.ids, result.ids)
        self.probes.report()
        if result.finish_reason == "interrupted":
            raise Interrupted(f"interrupted after {len(result.ids)} tokens")
        if result.finish_reason == "error":
            raise overflow_error(result, len(result.ids))

    def _generate(self, engine: Engine) -> Result:
        with ExitStack() as stack:
            stack.enter_context(self.probes.attached(engine.runtime))
            on_logits = None
            if self.logits is not None:
                rows = stack.enter_context(NpyRows(self.logits, engine.config.vocabulary))
                on_logits = partial(_append_row, rows)
            return engine.complete(
                self.prompt.ids,
                self.output.piece,
                max_tokens=self.max_tokens,
                sampling=self.sampling,
                stop=self.stop,
                ignore_eos=self.ignore_eos,
                on_logits=on_logits,
                interrupted=self.interrupted,
            )


def _append_row(rows: NpyRows, logits_V: npt.NDArray[np.float32]) -> None:
    rows.append(logits_V[np.newaxis])


def make_task(options: RunOptions, setting: Setting) -> EngineTask | Task:
    """Check the prompt and the outputs before any weight is read.

    Raises:
        UsageError: The prompt or an option does not fit the model.
        CheckpointError: The model's tokenizer or generation settings cannot be used.
    """
    require_apart(options, setting.directory)
    config, text = setting.config, setting.text
    has_text = options.prompt is not None or options.prompt_file is not None
    tokenizer = text.require_tokenizer() if has_text else text.tokenizer
    if options.expected is not None:
        return make_trace_task(options, setting)
    if options.greedy and not has_text and options.prompt_ids is None:
        options = replace(options, prompt_ids=start_ids(config.vocabulary))
    prompt = read_prompt(options, tokenizer, config.vocabulary, setting.launcher)
    context = context_size(options, len(prompt.ids), config.max_positions)
    sampling = SamplingOptions()
    if not options.greedy:
        sampling = chosen_sampling(options, text.advised, tokenizer, config.vocabulary)
    if wants_several(options):
        return SeveralTask(options, prompt, sampling, context, tokenizer, setting.interrupted)
    if options.logits is not None:
        require_writable(Path(options.logits))
    return RunTask(
        prompt=prompt,
        max_tokens=options.max_tokens,
        sampling=sampling,
        stop=stop_strings(options, tokenizer),
        ignore_eos=options.ignore_eos,
        context=context,
        output=Output(options, tokenizer),
        logits=Path(options.logits) if options.logits is not None else None,
        probes=_probes(options, config, tokenizer),
        interrupted=setting.interrupted,
        saved=read_saved_prompt(options),
    )


def stop_strings(options: RunOptions, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """The strings before which the text ends.

    Raises:
        UsageError: There are some, but the model has no tokenizer.
    """
    if options.stop and tokenizer is None:
        raise UsageError("--stop is about text, but this model has no tokenizer: leave it out")
    return tuple(unescape(text) for text in options.stop)


def make_trace_task(options: RunOptions, setting: Setting) -> TraceTask:
    """Check a trace, and whether it fits the model and the prompt, before any weight is read.

    Raises:
        UsageError: It does not, or cannot be read.
    """
    config, tokenizer, prompt_ids = setting.config, setting.text.tokenizer, None
    if any(getattr(options, name) is not None for name in PROMPTS):
        prompt_ids = read_prompt(options, tokenizer, config.vocabulary, setting.launcher).ids
    assert options.expected is not None
    trace = read_trace(options.expected, prompt_ids, options.max_tokens, config.vocabulary)
    context = context_size(options, len(trace.prompt_ids), config.max_positions)
    require_room(len(trace.prompt_ids) + options.max_tokens - 1, context, config.max_positions)
    return TraceTask(
        name=options.expected,
        trace=trace,
        steps=options.max_tokens,
        context=context,
        valid_vocabulary=setting.text.valid_vocabulary,
        as_json=options.json,
        probes=_probes(options, config, tokenizer),
        interrupted=setting.interrupted,
    )


def _probes(options: RunOptions, config: ModelConfig, tokenizer: Tokenizer | None) -> Probes:
    return make_probes(options, config, lambda: find_model(options).name(), partial(token_line, tokenizer))


def context_size(options: RunOptions, prompt_tokens: int, max_positions: int) -> int:
    """Positions of the run's context.

    Raises:
        UsageError: --ctx is more than the model's maximum, or the prompt does not fit.
    """
    require_context(options.ctx, max_positions)
    context = options.ctx or min(max_positions, prompt_tokens + options.max_tokens)
    require_room(prompt_tokens, context, max_positions)
    return context


@click.command()
@prompt_options
@model_options
@sampling_options
@continuation_options
@output_options
@context_options
@debug_options
@click.argument("legacy", metavar="[STORE STEPS [TRACE]]", nargs=-1, type=PathName())
@click.pass_context
def run(
    context: click.Context, /, config: str | None, print_config: bool, legacy: tuple[str, ...], **values: Any
) -> None:
    """Continue a text.

    Each option can also be set as DIST_MOE_<NAME> in the environment and in a --config file.

    STORE STEPS [TRACE] is the legacy form of a predecessor: that many greedy steps. With TRACE (base name of .ids.npy,
    .logits.npy and .probs.npy, or a .npy or .json file of token ids) each step is compared with it; one token that
    differs gives exit code 2.

    \b
    Examples:
      dist-moe run -p "Once upon a time" -n 64
      dist-moe run -p "Once" --show-tokens --debug timing
      dist-moe run -p "Once" --routing once.npz
      dist-moe run model-q8 5 q3_trace
    """  # noqa: D301  click wants the character
    config_file.keep_one(context, PROMPTS)
    if legacy:
        context.params.update(legacy_values(context))
    names = {*values, "greedy", "expected"} if legacy else {*values}
    options = RunOptions(**{name: context.params[name] for name in names})
    if print_config:
        source = find_model(options)
        if source.format is None:
            source.read_config()
        advised = read_generation_config(source.text_directory())
        config_file.print_config(context, advised_values(advised))
        return
    if not legacy and not any(context.params[name] is not None for name in PROMPTS):
        raise UsageError("there is nothing to continue: give --prompt TEXT, --prompt-file FILE or --prompt-ids 1,2,3")
    run_job(options, make_task)
