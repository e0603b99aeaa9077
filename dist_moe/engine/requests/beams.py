"""Beam search without a model: which hypotheses live on. Pure bookkeeping, on rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_moe.engine.requests.request import Completion, FinishReason, TokenLogprob
from dist_moe.engine.requests.scores import score


@dataclass(frozen=True)
class BeamOptions:
    """How wide to search, and how length counts; see `scores.score`."""

    beams: int
    length_penalty: float = 0.0


@dataclass(frozen=True)
class Hypothesis:
    """A text that may be the best one. `parent` is its place among those that lived before its last token."""

    tokens: tuple[TokenLogprob, ...] = ()
    logprob: float = 0.0
    parent: int = 0
    reason: FinishReason | None = None

    def completion(self) -> Completion:
        """As the engine's other texts."""
        return Completion([token.id for token in self.tokens], self.reason, logprobs=list(self.tokens))


class Beams:
    """The search for the texts of the highest score.

    At each place all continuations of all living hypotheses are ranked by (log-probability of the text descending,
    hypothesis, token id ascending). Those of the best `beams` that end with a stop token are finished; the best `beams`
    that do not end live on. The search ends when no living hypothesis can surpass the best `beams` finished ones.

    Attributes:
        live: Best first; empty when the search has ended.
    """

    def __init__(self, options: BeamOptions, limit: int, stop_ids: frozenset[int]) -> None:
        """Begin with the prompt alone.

        Args:
            options: Width and length penalty.
            limit: Tokens of a text at most, from 1.
            stop_ids: Tokens that end a text.
        """
        self._options = options
        self._limit = limit
        self._stop_ids = stop_ids
        self._finished: list[Hypothesis] = []
        self.live = [Hypothesis()]

    @property
    def needed(self) -> int:
        """How many of the best tokens of each place decide."""
        return self._options.beams + len(self._stop_ids)

    def advance(self, best: Sequence[Sequence[TokenLogprob]], at_limit: FinishReason) -> None:
        """Take the next token.

        Args:
            best: For each living hypothesis the best next tokens, `needed` of them or all.
            at_limit: Why texts of the full length end.
        """
        beams = self._options.beams
        live: list[Hypothesis] = []
        continuations = [
            (-(parent.logprob + token.logprob), place, token.id, token)
            for place, parent in enumerate(self.live)
            for token in best[place]
        ]
        continuations.sort(key=lambda found: found[:3])
        for rank, (negated, place, token_id, token) in enumerate(continuations):
            text = Hypothesis((*self.live[place].tokens, token), -negated, place)
            if token_id in self._stop_ids:
                if rank < beams:
                    self._finished.append(replace(text, reason="stop"))
            elif len(live) < beams:
                live.append(text)
        self.live = live
        self._keep_best()
        if live and len(live[0].tokens) == self._limit:
            self.end(at_limit)
        elif self._decided():
            self.live = []

    def end(self, reason: FinishReason) -> None:
        """Finish all living hypotheses as they are."""
        self._finished += [replace(text, reason=reason) for text in self.live]
        self.live = []
        self._keep_best()

    def completions(self) -> list[Completion]:
        """The finished texts, best first, at most `beams`."""
        return [text.completion() for text in self._finished]

    def _keep_best(self) -> None:
        """Ties go to the text that was finished first."""
        self._finished.sort(key=lambda text: -self._score(text))
        del self._finished[self._options.beams :]

    def _score(self, text: Hypothesis) -> float:
        return score(text.logprob, len(text.tokens), self._options.length_penalty)

    def _decided(self) -> bool:
        """Log-probabilities only sink, and nothing divides a negative one by more than the greatest length."""
        if len(self._finished) < self._options.beams or not self.live:
            return not self.live
        hope = score(self.live[0].logprob, self._limit, self._options.length_penalty)
        return hope <= self._score(self._finished[-1])
