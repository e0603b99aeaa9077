"""The options that say how tokens are drawn and how many continuations are made; docs/sampling.md defines them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from dist_moe.cli.config_file import apply, option
from dist_moe.cli.values import Number, Whole, refuse
from dist_moe.engine.requests.sampling_limits import NUMBER_LIMITS, WHOLE_LIMITS
from dist_moe.engine.start.settings import MOST_BEAMS, MOST_BIAS, MOST_LOGPROBS, MOST_SAMPLES

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

DRY_BREAKERS = '["\\n", ":", "\\"", "*"]'  # those of the sampler's authors
_BIAS = re.compile(r"\s*(\d{1,9})\s*=\s*([+-]?(\d+\.?\d*|\.\d+)|-inf(inity)?)\s*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class SamplingChoices:
    """How tokens are drawn. None: as the model's makers advise."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_last_n: int
    dry_breakers: str
    logit_bias: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Continuations:
    """How many continuations are made of one prompt, and what is told of their probabilities."""

    samples: int
    beams: int | None
    length_penalty: float
    logprobs: int | None


class TokenBias(click.types.StringParamType):
    """A token id and what is added to its logit, like 5=+1.5 or 9=-inf; the value stays a text, see `parse_bias`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check."""
        text = super().convert(value, param, ctx)
        found = _BIAS.fullmatch(text)
        if found is None or ("inf" not in found[2].lower() and abs(float(found[2])) > MOST_BIAS):
            refuse(f"ID=BIAS with a bias of -{MOST_BIAS:g} to {MOST_BIAS:g} or -inf, like 5=+1.5", value, param, ctx)
        return f"{int(found[1])}={found[2].lower()}"


def parse_bias(text: str) -> tuple[int, float]:
    """The token and the bias of a `TokenBias`."""
    token, bias = text.split("=")
    return int(token), float(bias)


class TextList(click.types.StringParamType):
    """A JSON list of texts; the value stays a text, see `json.loads`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check."""
        text = super().convert(value, param, ctx)
        try:
            found = json.loads(text)
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list) or not all(isinstance(item, str) and item for item in found):
            refuse('a JSON list of texts that are not empty, like ["\\n", ":"]', value, param, ctx)
        return text


def _number(name: str) -> Number:
    return Number(*NUMBER_LIMITS[name])


def _whole(name: str) -> Whole:
    least, most = WHOLE_LIMITS[name]
    return Whole(min=least, max=most)


def sampling_options(command: Decorated) -> Decorated:
    """How tokens are drawn. Logits are changed in the order of the penalties below, then tokens are left out."""
    return apply(command, (*_filters(), *_penalties(), *_dry(), _bias(), _seed()))


def continuation_options(command: Decorated) -> Decorated:
    """How many continuations are made, and their probabilities."""
    return apply(command, _continuations())


def _filters() -> tuple[Callable[[Any], Any], ...]:
    from_model = "the model's generation_config.json, else {}"
    return (
        option(
            "--temperature",
            type=_number("temperature"),
            show_default=from_model.format("0"),
            help="0 takes the best token (greedy); higher is more random. Applied after the penalties; then top-k, "
            "top-p, min-p and typical-p leave tokens out, in this order.",
        ),
        option(
            "--top-k",
            type=_whole("top_k"),
            show_default=from_model.format("0"),
            help="Draw from the k best tokens; 0 is off.",
        ),
        option(
            "--top-p",
            type=_number("top_p"),
            show_default=from_model.format("1"),
            help="Draw from the best tokens that reach this probability; 1 is off.",
        ),
        option(
            "--min-p",
            type=_number("min_p"),
            show_default=from_model.format("0"),
            help="Leave out tokens less probable than this share of the best one's; 0 is off.",
        ),
        option(
            "--typical-p",
            type=_number("typical_p"),
            show_default=from_model.format("1"),
            help="Of what is left, draw from the tokens whose surprise is the most usual one, until they reach this "
            "probability (locally typical sampling); 1 is off.",
        ),
    )


def _penalties() -> tuple[Callable[[Any], Any], ...]:
    return (
        option(
            "--repetition-penalty",
            type=_number("repetition_penalty"),
            show_default="the model's generation_config.json, else 1",
            help="Divide positive and multiply negative logits of tokens of the prompt and the text; 1 is off.",
        ),
        option(
            "--repeat-last-n",
            type=_whole("repeat_last_n"),
            default=-1,
            help="How many last tokens --repetition-penalty looks at; -1 is all, 0 none.",
        ),
        option(
            "--presence-penalty",
            type=_number("presence_penalty"),
            default=0.0,
            help="Take this from the logits of tokens that were generated.",
        ),
        option(
            "--frequency-penalty",
            type=_number("frequency_penalty"),
            default=0.0,
            help="Take this from the logit of a token for each time that it was generated.",
        ),
    )


def _dry() -> tuple[Callable[[Any], Any], ...]:
    return (
        option(
            "--dry-multiplier",
            type=_number("dry_multiplier"),
            default=0.0,
            help="DRY: take multiplier * base^(length - allowed length) from the logit of a token that would prolong "
            "a repetition of so many tokens; 0 is off.",
        ),
        option("--dry-base", type=_number("dry_base"), default=1.75, help="DRY: how fast the penalty grows."),
        option(
            "--dry-allowed-length",
            type=_whole("dry_allowed_length"),
            default=2,
            help="DRY: shorter repetitions are free.",
        ),
        option(
            "--dry-last-n",
            type=_whole("dry_last_n"),
            default=-1,
            help="DRY: how many last tokens are looked at; -1 is all, 0 none.",
        ),
        option(
            "--dry-breakers",
            type=TextList(),
            metavar="JSON",
            default=DRY_BREAKERS,
            help="DRY: texts over which no repetition is seen to reach.",
        ),
    )


def _bias() -> Callable[[Any], Any]:
    return option(
        "--logit-bias",
        type=TokenBias(),
        multiple=True,
        metavar="ID=BIAS",
        show_default=False,
        help="Add BIAS to a token's logit before the penalties; -inf bans it. Can be given several times.",
    )


def _seed() -> Callable[[Any], Any]:
    return option(
        "--seed",
        type=_whole("seed"),
        default=0,
        help="Of the random numbers: the same seed gives the same text, on any number of ranks.",
    )


def _continuations() -> tuple[Callable[[Any], Any], ...]:
    return (
        option(
            "--samples",
            type=Whole(min=1, max=MOST_SAMPLES),
            default=1,
            help="Draw so many independent continuations together, and print them by their score, best first.",
        ),
        option(
            "--beams",
            type=Whole(min=1, max=MOST_BEAMS),
            show_default=False,
            help="Beam search of this width: the continuations of the highest score, best first, with nothing drawn.",
        ),
        option(
            "--length-penalty",
            type=Number(0, 10),
            default=0.0,
            help="A continuation's score is its log-probability / length^this: 0 its log-probability, 1 its mean.",
        ),
        option(
            "--logprobs",
            type=Whole(min=0, max=MOST_LOGPROBS),
            show_default=False,
            help="With --json, give each token's log-probability and the N best tokens with theirs: the model's own, "
            "at temperature 1, before penalties and filters.",
        ),
    )
