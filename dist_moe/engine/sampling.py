"""Rank 0 draws a token from the candidates, or from the whole row where they cannot decide."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dist_moe.engine.candidates import Candidates, row_candidates
from dist_moe.engine.request import SamplingOptions
from dist_moe.kernels import Kernels, SamplingParameters

FetchRow = Callable[[], npt.NDArray[np.float32]]


def draw_token(
    kernels: Kernels,
    options: SamplingOptions,
    position: int,
    candidates: Candidates,
    fetch_row: FetchRow,
    valid_vocabulary: int,
) -> int:
    """One token, the same whether the candidates decide or the whole row must (NUMERICS rules 13 and 14).

    Args:
        kernels: An ISA level with its threads.
        options: How to draw.
        position: Where the token will stand in its sequence: the random number depends on it.
        candidates: The best tokens of the row.
        fetch_row: Gets the whole row of logits from all ranks.
        valid_vocabulary: Ids from here on are masked.
    """
    how = SamplingParameters(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
        position=position,
    )
    place = _place(kernels, how, candidates)
    if place < 0:
        logits_V = fetch_row()
        candidates = row_candidates(kernels, logits_V, options.temperature, valid_vocabulary, len(logits_V))
        place = _place(kernels, how, candidates)
    assert place >= 0, "a complete list of candidates always decides"
    return int(candidates.ids_C[place])


def _place(kernels: Kernels, how: SamplingParameters, candidates: Candidates) -> int:
    place, _ = kernels.sample(
        how, candidates.ids_C, candidates.logits_C, candidates.max_B, candidates.sum_B, candidates.complete
    )
    return place
