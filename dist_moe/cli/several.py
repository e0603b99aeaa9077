"""`dist-moe run` with --samples, --beams or --logprobs: texts that are printed when all are made, best first."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from dist_moe.cli.options import RunOptions
from dist_moe.cli.prompt import Prompt
from dist_moe.cli.summary import as_json, summary_lines
from dist_moe.engine.engine import Engine
from dist_moe.engine.requests.pieces import Result, TokenLogprob
from dist_moe.engine.requests.request import SamplingOptions
from dist_moe.engine.watch.statistics import EngineStatistics
from dist_moe.errors import Interrupted, StoreError, UsageError
from dist_moe.text.tokenizer import Tokenizer

_ONE_TEXT = ("logits", "routing", "debug", "stats", "trace", "show_tokens", "stop", "prompt_cache")
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
    prompt: Prompt
    sampling: SamplingOptions
    context: int
    tokenizer: Tokenizer | None
    interrupted: Callable[[], bool]

    def lead_engine(self, engine: Engine) -> None:
        """Make them and print them.

        Raises:
            StoreError: The model's numbers overflowed in all of them.
            Interrupted: By Ctrl-C; what was made is printed.
        """
        options = self.options
        results = engine.complete_several(
            self.prompt.ids,
            samples=options.samples,
            beams=options.beams,
            length_penalty=options.length_penalty,
            logprobs=options.logprobs or 0,
            max_tokens=options.max_tokens,
            sampling=self.sampling,
            ignore_eos=options.ignore_eos,
            interrupted=self.interrupted,
        )
        if options.json:
            click.echo(json.dumps(self._as_json(results, engine.statistics()), ensure_ascii=False))
        else:
            self._print(results, engine.statistics())
        _judge(results)

    def _print(self, results: list[Result], statistics: EngineStatistics) -> None:
        shown = "" if self.options.quiet else self.prompt.text
        for rank, result in enumerate(results, 1):
            sample = "" if result.sample is None else f" (sample {result.sample})"
            reason, tokens = result.error or result.finish_reason, len(result.ids)
            text = result.text if self.tokenizer else ",".join(map(str, result.ids))
            click.echo(f"--- {rank} of {len(results)}{sample}: score {result.score:.4f}, {tokens} tokens, {reason}")
            click.echo(shown + text)
        if not self.options.quiet:
            for line in summary_lines(statistics):
                click.echo(line, err=True)

    def _as_json(self, results: list[Result], statistics: EngineStatistics) -> dict[str, Any]:
        """The best one as `run` prints a single one, and all under `choices`."""
        found = self._choice(results[0]) | as_json(results[0], self._text(results[0]), statistics)
        if self.options.samples > 1 or self.options.beams is not None:
            found["choices"] = [{"rank": rank, **self._choice(result)} for rank, result in enumerate(results, 1)]
            generated = sum(len(result.ids) for result in results)
            total = found["usage"]["prompt_tokens"] + generated
            found["usage"] |= {"completion_tokens": generated, "total_tokens": total}
        return found

    def _choice(self, result: Result) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "text": self._text(result),
            "ids": list(result.ids),
            "finish_reason": result.finish_reason,
            "error": result.error,
            "sample": result.sample,
            "logprob": _rounded(result.logprob),
            "score": _rounded(result.score or 0.0),
        }
        if self.options.logprobs is not None:
            choice["logprobs"] = [self._token(token) for token in result.logprobs]
        return choice

    def _text(self, result: Result) -> str | None:
        return result.text if self.tokenizer else None

    def _token(self, token: TokenLogprob) -> dict[str, Any]:
        best = [self._named(id_, logprob) for id_, logprob in token.best]
        return {**self._named(token.id, token.logprob), "best": best}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = {"text": self.tokenizer.decode([token])} if self.tokenizer else {}
        return {"id": token, **text, "logprob": _rounded(logprob)}


def _judge(results: list[Result]) -> None:
    longest = max(len(result.ids) for result in results)
    if any(result.finish_reason == "interrupted" for result in results):
        raise Interrupted(f"interrupted after {longest} tokens")
    if all(result.finish_reason == "error" for result in results):
        raise overflow_error(results[0], longest)


def overflow_error(result: Result, tokens: int) -> StoreError:
    """What to say where the model's numbers overflowed after so many tokens."""
    return StoreError(
        f"the text ended after {tokens} tokens: {result.error}: the weights are damaged (see dist-moe inspect "
        "--verify) or this text overflows the model"
    )


def _rounded(logprob: float) -> float:
    """Without the digits that float32 sums do not give."""
    return round(logprob, 6)
