"""Which of several continuations of one prompt is the best."""

from __future__ import annotations

from collections.abc import Sequence

from dist_moe.engine.requests.request import Completion
from dist_moe.kernels import Kernels


def score_of(completion: Completion, length_penalty: float) -> float:
    """The `score` of a completion that has logprobs."""
    return score(completion.cumulated_logprob, len(completion.ids), length_penalty)


def score(logprob: float, tokens: int, length_penalty: float) -> float:
    """A text's log-probability divided by length^length_penalty (0: as it is; 1: the mean per token).

    Args:
        logprob: Of the whole text.
        tokens: Its length.
        length_penalty: From 0.
    """
    return logprob if length_penalty == 0 else logprob / Kernels.power(max(1, tokens), length_penalty)


def ranking(completions: Sequence[Completion], length_penalty: float) -> list[int]:
    """The places of completions that have logprobs, best score first; ties go to the first, broken texts stand last."""

    def key(place: int) -> tuple[bool, float, int]:
        found = completions[place]
        return found.error is not None, -score_of(found, length_penalty), place

    return sorted(range(len(completions)), key=key)
