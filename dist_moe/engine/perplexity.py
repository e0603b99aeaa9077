"""How well a model predicts a text, and how far its predictions are from another one's.

All figures are float64 sums over the model's own logits; those are the same bits on any number of ranks.
Shape suffixes: N positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """A mean over positions, and its standard error (0 for a single position)."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Doubles) -> Mean:
        """The mean of independent values."""
        error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return cls(float(values.mean()), error)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-probability of `tokens` predicted tokens, and its standard error (delta method)."""

    tokens: int
    value: float
    error: float

    @classmethod
    def of(cls, logprobs: Doubles) -> Perplexity:
        """From the log-probabilities of all predicted tokens."""
        mean = Mean.of(-logprobs)
        value = math.exp(mean.value)
        return cls(len(logprobs), value, value * mean.error)


@dataclass(frozen=True)
class Comparison:
    """Predictions beside those of a base: Kullback-Leibler divergences of the base from them, in nats.

    Attributes:
        base: The base's own perplexity.
        ratio: Perplexity over the base's, with its standard error.
        kl: Mean divergence.
        kl_median, kl_99, kl_max: The median, the 99th percentile and the largest.
        same_top: Share of positions whose most probable token is the same.
    """

    base: Perplexity
    ratio: Mean
    kl: Mean
    kl_median: float
    kl_99: float
    kl_max: float
    same_top: Mean


@dataclass(frozen=True)
class RowPair:
    """What one position gives: the token's log-probability here and there, their divergence, and whether tops agree."""

    logprob: Doubles
    base_logprob: Doubles
    kl: Doubles
    same_top: npt.NDArray[np.bool_]


def log_softmax(logits_NV: Floats) -> Doubles:
    """Log-probabilities, float64 [N, V]."""
    wide_NV = logits_NV.astype(np.float64)
    wide_NV -= wide_NV.max(axis=1, keepdims=True)
    wide_NV -= np.log(np.exp(wide_NV).sum(axis=1, keepdims=True))
    return wide_NV


def logprobs_of(logits_NV: Floats, targets_N: Sequence[int] | npt.NDArray[np.int32]) -> Doubles:
    """The log-probability of each row's token, float64 [N]."""
    found_N: Doubles = log_softmax(logits_NV)[np.arange(len(logits_NV)), np.asarray(targets_N)]
    return found_N


def divergences(logits_NV: Floats, base_NV: Floats) -> Doubles:
    """Kullback-Leibler divergence of each row's base from it, in nats, float64 [N]."""
    return _divergences(log_softmax(logits_NV), log_softmax(base_NV))


def _divergences(here_NV: Doubles, base_NV: Doubles) -> Doubles:
    with np.errstate(invalid="ignore"):  # a base that is certain: 0 * -inf
        terms_NV = np.exp(base_NV) * (base_NV - here_NV)
    found_N: Doubles = np.nan_to_num(terms_NV, nan=0.0).sum(axis=1).clip(min=0.0)
    return found_N


def compare_rows(logits_NV: Floats, base_NV: Floats, targets_N: npt.NDArray[np.int32]) -> RowPair:
    """Predictions of the same tokens by two models."""
    here_NV, base_logp_NV = log_softmax(logits_NV), log_softmax(base_NV)
    rows = np.arange(len(targets_N))
    return RowPair(
        here_NV[rows, targets_N],
        base_logp_NV[rows, targets_N],
        _divergences(here_NV, base_logp_NV),
        logits_NV.argmax(axis=1) == base_NV.argmax(axis=1),
    )


def compare(pairs: Sequence[RowPair]) -> Comparison:
    """All positions together."""
    here = np.concatenate([pair.logprob for pair in pairs])
    base = np.concatenate([pair.base_logprob for pair in pairs])
    kl = np.concatenate([pair.kl for pair in pairs])
    same = np.concatenate([pair.same_top for pair in pairs]).astype(np.float64)
    difference = Mean.of(base - here)
    ratio = math.exp(difference.value)
    return Comparison(
        base=Perplexity.of(base),
        ratio=Mean(ratio, ratio * difference.error),
        kl=Mean.of(kl),
        kl_median=float(np.median(kl)),
        kl_99=float(np.percentile(kl, 99)),
        kl_max=float(kl.max()),
        same_top=Mean.of(same),
    )
