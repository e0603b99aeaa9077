"""Rank 0 draws a token from the candidates, or from the whole row where they cannot decide."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dist_moe.engine.requests.candidates import Candidates, row_candidates
from dist_moe.engine.requests.penalties import History
from dist_moe.engine.requests.request import Completion, Request, TokenLogprob
from dist_moe.kernels import Kernels, SamplingParameters

Floats = npt.NDArray[np.float32]
FetchRow = Callable[[], Floats]

# How many of a fetched row's tokens are ranked first, before all of them: few draws need more.
FIRST_RANKED = 4096

_NO_BLOCKS = np.empty(0, dtype=np.float32)


class Sampler:
    """Draws the tokens of one request."""

    def __init__(self, request: Request) -> None:
        """Remember how to draw; what penalties need of the past is gathered at the first draw."""
        self._request = request
        self._history: History | None = None

    def draw(
        self,
        kernels: Kernels,
        completion: Completion,
        candidates: Candidates,
        fetch_row: FetchRow,
        valid_vocabulary: int,
    ) -> int:
        """Draw the next token and add it, the same whether candidates or the row decide (NUMERICS rules 13 and 14).

        Args:
            kernels: An ISA level with its threads.
            completion: What was generated; gets the token, and its log-probability if the request asks for it.
            candidates: The best tokens of the row.
            fetch_row: Gets the whole row of logits from all ranks.
            valid_vocabulary: Ids from here on are masked.

        Returns:
            The token.
        """
        if self._request.sampling.changes_logits:
            self._history = self._history or History(self._request, valid_vocabulary)
            self._history.catch_up(completion.ids)
        how = self._parameters(len(completion.ids))
        token = _choose(kernels, how, self._changed(kernels, candidates))
        logits_V = None
        if token is None:
            logits_V = fetch_row()
            token = self._choose_from_row(kernels, how, logits_V, valid_vocabulary)
        completion.ids.append(token)
        if self._request.logprobs is not None:
            completion.logprobs.append(self._logprob(kernels, token, candidates, logits_V))
        return token

    def _parameters(self, generated: int) -> SamplingParameters:
        options = self._request.sampling
        return SamplingParameters(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            typical_p=options.typical_p,
            seed=options.seed,
            sample_index=self._request.sample,
            position=len(self._request.prompt_ids) + generated,
        )

    def _changed(self, kernels: Kernels, candidates: Candidates) -> Candidates | None:
        """The candidates after all penalties, as far as their order is certain; None if it is not at all.

        A logit that was changed is not in the block sums, so the mass of the whole vocabulary is no longer known.
        """
        if self._history is None:
            return candidates
        decides = candidates.complete or self._history.only_sinks(candidates.ids_C)
        if len(candidates.ids_C) == 0 or not decides:
            return None
        ids_C, logits_C = candidates.ids_C.copy(), candidates.logits_C.copy()
        floor, floor_id = logits_C[-1], ids_C[-1]
        self._history.penalize(kernels, logits_C, ids_C)
        kernels.merge_candidates(ids_C[None], logits_C[None], len(ids_C))
        certain = len(ids_C)
        if not candidates.complete:
            # Every other token ranks behind the last candidate as it was, and can only have sunk.
            certain = int(((logits_C > floor) | ((logits_C == floor) & (ids_C <= floor_id))).sum())
        return Candidates(ids_C[:certain], logits_C[:certain], _NO_BLOCKS, _NO_BLOCKS, candidates.complete)

    def _choose_from_row(
        self, kernels: Kernels, how: SamplingParameters, logits_V: Floats, valid_vocabulary: int
    ) -> int:
        if self._history is not None:
            logits_V = logits_V.copy()
            self._history.penalize(kernels, logits_V[:valid_vocabulary])
        for count in (FIRST_RANKED, len(logits_V)):
            found = row_candidates(kernels, logits_V, how.temperature, valid_vocabulary, count)
            token = _choose(kernels, how, found)
            if token is not None:
                return token
        raise AssertionError("a complete list of candidates always decides")

    def _logprob(self, kernels: Kernels, token: int, candidates: Candidates, logits_V: Floats | None) -> TokenLogprob:
        """The model's own log-probabilities of the token and of the best ones."""
        count = min(self._request.logprobs or 0, len(candidates.ids_C))
        place = np.flatnonzero(candidates.ids_C == token)
        if len(place):
            own = candidates.logits_C[place[0]]
        else:
            assert logits_V is not None, "a token that is no candidate was drawn from the row"
            own = logits_V[token]
        found = log_probabilities(kernels, candidates, np.append(candidates.logits_C[:count], own))
        best = zip(candidates.ids_C[:count].tolist(), found[:-1], strict=True)
        return TokenLogprob(token, found[-1], tuple(best))


def log_probabilities(kernels: Kernels, candidates: Candidates, logits_N: Floats) -> list[float]:
    """Log p of some logits of a row whose candidates came with the sums at temperature 1."""
    assert candidates.unit_sum_B is not None
    out_N = np.empty(len(logits_N), dtype=np.float64)
    kernels.log_probabilities(out_N, logits_N, candidates.max_B, candidates.unit_sum_B)
    found: list[float] = out_N.tolist()
    return found


def _choose(kernels: Kernels, how: SamplingParameters, found: Candidates | None) -> int | None:
    """The token, or None if the candidates cannot decide."""
    if found is None:
        return None
    max_B, sum_B = found.max_B, found.sum_B
    if how.temperature == 0 or how.top_k > 0:
        max_B = sum_B = _NO_BLOCKS  # the mass of all tokens, which takes longer than the draw, decides nothing
    place, _ = kernels.sample(how, found.ids_C, found.logits_C, max_B, sum_B, found.complete)
    return int(found.ids_C[place]) if place >= 0 else None
