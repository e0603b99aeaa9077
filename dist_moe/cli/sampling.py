"""How a run draws its tokens: what the options say, else what the model's makers advise."""

from __future__ import annotations

from typing import Any

from dist_moe.cli.chat_options import ChatOptions
from dist_moe.cli.options import RunOptions
from dist_moe.engine.request import SamplingOptions
from dist_moe.text.generation_config import GENERATION_FILE, GenerationConfig

NAMES = ("temperature", "top_k", "top_p", "min_p")


def sampling_options(options: RunOptions | ChatOptions, advised: GenerationConfig) -> SamplingOptions:
    """The options that were given, completed by the model's own."""
    chosen = {name: getattr(options, name) for name in NAMES}
    missing = {name: getattr(advised, name) for name, value in chosen.items() if value is None}
    return SamplingOptions(**{**chosen, **missing}, seed=options.seed)


def advised_values(advised: GenerationConfig) -> dict[str, tuple[Any, str]]:
    """The model's advice by option name, each with its origin, for --print-config."""
    return {name: (getattr(advised, name), f"the model's {GENERATION_FILE}, or its absence") for name in NAMES}
