"""Rotary frequencies as transformers 5 rounds them: f32 steps in torch's order (modeling_rope_utils.py, 5.23.0).

torch's own bits of `theta ** x` depend on the machine: its AVX2 and AVX-512 builds use SLEEF's powf, which is 1 ulp
off in about one element of a hundred (Qwen3-30B-A3B's frequency 37 is one), its plain build uses libm's, which is
correctly rounded in all but rare places. Here the power is correctly rounded everywhere. The manifest keeps the
results as bits (NUMERICS rule 3). P head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Yarn:
    """YaRN's settings, named as in config.json; None where transformers derives the value."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class RopeSettings:
    """What decides a model's rotary embedding."""

    head_dim: int
    theta: float
    yarn: Yarn | None = None


def rope_frequencies(settings: RopeSettings) -> tuple[F32, np.float32]:
    """The inverse frequencies [P / 2] and the factor on cos and sin, both f32.

    They equal transformers' bits under ATEN_CPU_CAPABILITY=default; torch's vector builds differ by at most 1 ulp of
    the power, which is at most 2 ulp of `inv_freq`, in a few elements.
    """
    exponent_P = np.arange(0, settings.head_dim, 2).astype(np.float32) / np.float32(settings.head_dim)
    period_P = rounded_powers(settings.theta, exponent_P)
    if settings.yarn is None:
        return np.float32(1) / period_P, np.float32(1)
    return yarn_frequencies(period_P, settings, settings.yarn), np.float32(attention_factor(settings.yarn))


def rounded_powers(base: float, exponent_P: F32) -> F32:
    """f32(base) to the power of each exponent, rounded to f32 from 40 decimal digits: no library's own pow counts."""
    with localcontext() as context:
        context.prec = 40
        powers = [float(Decimal(float(np.float32(base))) ** Decimal(float(exponent))) for exponent in exponent_P]
    return np.array(powers, np.float64).astype(np.float32)


def attention_factor(yarn: Yarn) -> float:
    """YaRN's factor on cos and sin (so its square acts on the attention scores), f64."""
    if yarn.attention_factor is not None:
        return yarn.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if yarn.factor <= 1 else 0.1 * mscale * math.log(yarn.factor) + 1.0

    if yarn.mscale and yarn.mscale_all_dim:
        return magnitude(yarn.mscale) / magnitude(yarn.mscale_all_dim)
    return magnitude(1)


def yarn_frequencies(period_P: F32, settings: RopeSettings, yarn: Yarn) -> F32:
    """YaRN's blend of the frequencies [P / 2]: fast dimensions keep theirs, slow ones are divided by the factor."""
    extrapolated_P = np.float32(1) / period_P
    interpolated_P = np.float32(1) / (np.float32(yarn.factor) * period_P)
    low, high = correction_range(settings, yarn)
    if low == high:
        high += 0.001
    ramp_P = (np.arange(len(period_P), dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept_P = np.float32(1) - np.clip(ramp_P, np.float32(0), np.float32(1))
    blended_P: F32 = interpolated_P * (np.float32(1) - kept_P) + extrapolated_P * kept_P
    return blended_P


def correction_range(settings: RopeSettings, yarn: Yarn) -> tuple[float, float]:
    """The frequency indices between which YaRN's ramp runs, computed in f64 as transformers does."""

    def dimension(rotations: float) -> float:
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return (settings.head_dim * math.log(turns)) / (2 * math.log(settings.theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, settings.head_dim - 1)
