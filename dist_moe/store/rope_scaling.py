"""`--rope-scaling yarn:FACTOR`: a longer context for a model with plain rotary frequencies, as transformers has it.

Static YaRN: the frequencies of all positions change, so all prompts give other numbers, short ones too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dist_moe.checkpoint.rope import RopeSettings, Yarn, rope_frequencies
from dist_moe.errors import UsageError
from dist_moe.model_config import ModelConfig

FORM = "yarn:FACTOR or yarn:FACTOR:ORIGINAL_POSITIONS, such as yarn:4 or yarn:4:32768"
LARGEST_FACTOR = 256

# The base is found again from frequencies that were rounded to f32: so many neighbours of the first guess are tried.
_NEIGHBOURS = 16


@dataclass(frozen=True)
class RopeScaling:
    """YaRN by `factor`; `original_positions` None: those that the model's config allows without it."""

    factor: float
    original_positions: int | None = None

    @classmethod
    def parse(cls, text: str) -> RopeScaling:
        """Read what --rope-scaling says.

        Raises:
            UsageError: It is not of the form, or the factor is not above 1.
        """
        match = re.fullmatch(r"yarn:([0-9]+(?:\.[0-9]+)?)(?::([0-9]{1,15}))?", text)
        if match is None:
            raise UsageError(f"--rope-scaling: expected {FORM}, found {text!r}")
        factor, original = float(match[1]), int(match[2]) if match[2] else None
        if not 1 < factor <= LARGEST_FACTOR or original == 0:
            raise UsageError(
                f"--rope-scaling: expected a factor above 1, up to {LARGEST_FACTOR}, and at least one position, "
                f"found {text!r}"
            )
        return cls(factor, original)


def scale_config(config: ModelConfig, scaling: RopeScaling | None) -> ModelConfig:
    """The model with other rotary frequencies and a longer context; itself if nothing is to be scaled.

    Raises:
        UsageError: The model is scaled already, or its context would not become longer.
    """
    if scaling is None:
        return config
    original = scaling.original_positions or config.max_positions
    positions = int(original * scaling.factor)
    if original > config.max_positions or positions <= config.max_positions:
        raise UsageError(
            f"--rope-scaling: {original} original positions times {scaling.factor:g} are {positions}, but the model "
            f"has {config.max_positions} without it: give at most {config.max_positions} original positions, and a "
            "factor that makes more of them"
        )
    yarn = Yarn(factor=scaling.factor, original_max_position_embeddings=original)
    settings = RopeSettings(config.head_dim, _theta(config), yarn)
    inv_freq, attention_factor = rope_frequencies(settings)
    return replace(config, inv_freq=inv_freq, attention_factor=attention_factor, max_positions=positions)


def _theta(config: ModelConfig) -> float:
    """The base of a model's plain frequencies, which stores keep as bits only.

    Raises:
        UsageError: No base gives these bits.
    """
    if config.attention_factor == 1:
        for theta in _candidates(config.inv_freq, config.head_dim):
            if np.array_equal(rope_frequencies(RopeSettings(config.head_dim, theta))[0], config.inv_freq):
                return theta
    raise UsageError(
        "--rope-scaling: the model's rotary frequencies are scaled already (rope_scaling in its config.json), and "
        "scaling them twice makes no sense: leave the option away"
    )


def _candidates(inv_freq_P: npt.NDArray[np.float32], head_dim: int) -> Iterator[float]:
    """Bases that may have given the frequencies, round numbers first."""
    lowest = float(inv_freq_P[-1])
    if not 0 < lowest < 1:
        return
    guess = lowest ** (-head_dim / (head_dim - 2))
    for digits in range(7):
        yield round(guess, digits - math.floor(math.log10(guess)))
    near = np.float32(guess)
    for _ in range(_NEIGHBOURS):
        near = np.nextafter(near, np.float32(0))
    for _ in range(2 * _NEIGHBOURS):
        near = np.nextafter(near, np.float32(np.inf))
        yield float(near)
