"""`dist-moe run` with --samples, --beams or --logprobs: texts that are printed when all are made, best first."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from dist_moe.cli.options import RunOptions
from dist_moe.cli.prompt import Prompt
from dist_moe.cli.summary import printed_timings, summary_lines
from dist_moe.engine.request import Completion, Request, TokenLogprob
from dist_moe.engine.runtime import Runtime
from dist_moe.engine.several import Continuation, Search, continue_several
from dist_moe.engine.statistics import EngineStatistics
from dist_moe.errors import Interrupted, StoreError, UsageError
from dist_moe.text.tokenizer import Tokenizer

_ONE_TEXT = ("logits", "routing", "debug", "show_tokens", "stop")
_DRAWS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
_CHANGES = ("presence_penalty", "frequency_penalty", "dry_multiplier", "logit_bias")


def wants_several(options: RunOptions) -> bool:
    """Whether texts are to be compared or measured.

    Raises:
        UsageError: Together with another option that is about a single text or about drawing.
    """
    by = [name for name, is_set in _wishes(options).items() if is_set]
    if not by:
        return False
    if options.samples > 1 and options.beams is not None:
        raise UsageError("--samples and --beams exclude each other: a beam search draws nothing")
    if options.logprobs is not None and not options.json:
        raise UsageError("--logprobs is printed with --json only: add --json")
    for name in _ONE_TEXT:
        if getattr(options, name):
            raise UsageError(f"--{name.replace('_', '-')} is about a single text: leave {by[0]} out, or it")
    drawn = [
        *(name for name in _DRAWS if getattr(options, name) is not None),
        *filter(options.__getattribute__, _CHANGES),
    ]
    if options.beams is not None and drawn:
        raise UsageError(
            f"--{drawn[0].replace('_', '-')} does nothing in a beam search, which compares the model's own "
            "probabilities: leave it or --beams out"
        )
    return True


def _wishes(options: RunOptions) -> dict[str, bool]:
    return {
        "--samples": options.samples > 1,
        "--beams": options.beams is not None,
        "--logprobs": options.logprobs is not None,
    }


@dataclass(frozen=True)
class SeveralTask:
    """A checked prompt, and the texts that are to be made of it."""

    options: RunOptions
    request: Request
    prompt: Prompt
    context: int
    valid_vocabulary: int
    tokenizer: Tokenizer | None
    interrupted: Callable[[], bool]

    def lead(self, engine: Runtime) -> None:
        """Make them and print them.

        Raises:
            StoreError: The model's numbers overflowed in all of them.
            Interrupted: By Ctrl-C; what was made is printed.
        """
        search = Search(self.options.samples, self.options.beams, self.options.length_penalty)
        found = continue_several(engine, self.request, search, self.valid_vocabulary, self.interrupted)
        if self.options.json:
            click.echo(json.dumps(self._as_json(found, engine.statistics()), ensure_ascii=False))
        else:
            self._print(found, engine.statistics())
        self._judge([one.completion for one in found])

    def _judge(self, completions: list[Completion]) -> None:
        longest = max(len(completion.ids) for completion in completions)
        if any(completion.finish_reason == "interrupted" for completion in completions):
            raise Interrupted(f"interrupted after {longest} tokens")
        if all(completion.finish_reason == "error" for completion in completions):
            raise StoreError(
                f"the text ended after {longest} tokens: {completions[0].error}: the weights are damaged (see dist-moe "
                "inspect --verify) or this text overflows the model"
            )

    def _print(self, found: list[Continuation], statistics: EngineStatistics) -> None:
        shown = "" if self.options.quiet else self.prompt.text
        for rank, one in enumerate(found, 1):
            sample = "" if one.sample is None else f" (sample {one.sample})"
            reason = one.completion.error or one.completion.finish_reason
            tokens = len(one.completion.ids)
            click.echo(f"--- {rank} of {len(found)}{sample}: score {one.score:.4f}, {tokens} tokens, {reason}")
            click.echo(shown + self._text(one.completion.ids))
        if not self.options.quiet:
            for line in summary_lines(statistics):
                click.echo(line, err=True)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids) if self.tokenizer else ",".join(map(str, ids))

    def _as_json(self, found: list[Continuation], statistics: EngineStatistics) -> dict[str, Any]:
        """The best one as `run` prints a single one, and all under `choices`."""
        generated = sum(len(one.completion.ids) for one in found)
        usage = {
            "prompt_tokens": len(self.prompt.ids),
            "reused_tokens": statistics.reused_tokens,
            "completion_tokens": generated,
            "total_tokens": len(self.prompt.ids) + generated,
        }
        result = {**self._choice(found[0]), "usage": usage, "timings": printed_timings(statistics)}
        if self.options.samples > 1 or self.options.beams is not None:
            result["choices"] = [{"rank": rank, **self._choice(one)} for rank, one in enumerate(found, 1)]
        return result

    def _choice(self, one: Continuation) -> dict[str, Any]:
        completion = one.completion
        choice: dict[str, Any] = {
            "text": self._text(completion.ids) if self.tokenizer else None,
            "ids": completion.ids,
            "finish_reason": completion.finish_reason,
            "error": completion.error,
            "sample": one.sample,
            "logprob": _rounded(completion.cumulated_logprob),
            "score": _rounded(one.score),
        }
        if self.options.logprobs is not None:
            choice["logprobs"] = [self._token(token) for token in completion.logprobs]
        return choice

    def _token(self, token: TokenLogprob) -> dict[str, Any]:
        best = [self._named(id_, logprob) for id_, logprob in token.best]
        return {**self._named(token.id, token.logprob), "best": best}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = {"text": self.tokenizer.decode([token])} if self.tokenizer else {}
        return {"id": token, **text, "logprob": _rounded(logprob)}


def _rounded(logprob: float) -> float:
    """Without the digits that float32 sums do not give."""
    return round(logprob, 6)
