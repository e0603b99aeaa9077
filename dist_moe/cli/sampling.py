"""How a run draws its tokens: what the options say, else what the model's makers advise."""

from __future__ import annotations

import json
from typing import Any

from dist_moe.cli.sampling_options import DRY_BREAKERS, SamplingChoices, parse_bias
from dist_moe.cli.token_ids import require_ids
from dist_moe.engine.requests.request import SamplingOptions
from dist_moe.errors import UsageError
from dist_moe.text.dry_breakers import breaker_tokens
from dist_moe.text.generation_config import GENERATION_FILE, GenerationConfig
from dist_moe.text.tokenizer import Tokenizer

ADVISED = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
ALWAYS_SET = (
    "seed",
    "repeat_last_n",
    "presence_penalty",
    "frequency_penalty",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_last_n",
)


def sampling_options(
    options: SamplingChoices, advised: GenerationConfig, tokenizer: Tokenizer | None, vocabulary: int
) -> SamplingOptions:
    """The options that were given, completed by the model's own.

    Args:
        options: Of the command line.
        advised: The model's.
        tokenizer: Finds DRY's breakers; None: there are none.
        vocabulary: Tokens that the model has.

    Raises:
        UsageError: An id is not in the vocabulary, or breakers were given for a model without a tokenizer.
    """
    chosen = {name: getattr(options, name) for name in ADVISED}
    missing = {name: getattr(advised, name) for name, value in chosen.items() if value is None}
    bias = tuple(parse_bias(text) for text in options.logit_bias)
    require_ids([token for token, _ in bias], vocabulary, "--logit-bias")
    if tokenizer is None and options.dry_multiplier and options.dry_breakers not in (DRY_BREAKERS, "[]"):
        raise UsageError("--dry-breakers are texts, but this model has no tokenizer: give --dry-breakers '[]'")
    breakers = json.loads(options.dry_breakers) if tokenizer and options.dry_multiplier else []
    return SamplingOptions(
        **{**chosen, **missing},
        **{name: getattr(options, name) for name in ALWAYS_SET},
        dry_breakers=breaker_tokens(tokenizer, breakers) if tokenizer and breakers else frozenset(),
        logit_bias=bias,
    )


def advised_values(advised: GenerationConfig) -> dict[str, tuple[Any, str]]:
    """The model's advice by option name, each with its origin, for --print-config."""
    return {name: (getattr(advised, name), f"the model's {GENERATION_FILE}, or its absence") for name in ADVISED}
