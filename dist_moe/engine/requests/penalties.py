"""What a request's past and its wishes do to logits: bias, repetition, presence and frequency penalties, DRY.

Shape suffixes: N logits, V the vocabulary that may be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dist_moe.engine.requests.dry import Dry
from dist_moe.engine.requests.request import Request
from dist_moe.kernels import Kernels, Penalties

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class History:
    """The tokens of one request so far, counted as its penalties need them."""

    def __init__(self, request: Request, valid_vocabulary: int) -> None:
        """Count the prompt.

        Args:
            request: Its prompt and how it is sampled.
            valid_vocabulary: V; tokens from here on are never drawn, so nothing is kept of them.
        """
        options = self._options = request.sampling
        self._how = Penalties(options.repetition_penalty, options.presence_penalty, options.frequency_penalty)
        self._ids = list(request.prompt_ids)
        self._prompt_tokens = len(self._ids)
        self._seen_V = np.zeros(valid_vocabulary, dtype=np.int32)
        self._count_V = np.zeros(valid_vocabulary, dtype=np.int32)
        self._bias_V = np.zeros(valid_vocabulary, dtype=np.float32)
        self._dry_V = np.zeros(valid_vocabulary, dtype=np.float32)
        self._dry = Dry(options) if options.dry_multiplier else None
        for token, bias in options.logit_bias:
            if token < valid_vocabulary:
                self._bias_V[token] += np.float32(bias)
        self._raised = np.flatnonzero(self._bias_V > 0)
        self._count_seen(0)
        _count(self._count_V, self._ids[self._prompt_tokens - request.continued :], 1)
        if self._dry:
            self._dry.extend(self._ids)

    def catch_up(self, generated: Sequence[int]) -> None:
        """Count the generated tokens that are new since the last call."""
        first = len(self._ids)
        new = generated[first - self._prompt_tokens :]
        self._ids.extend(new)
        self._count_seen(first)
        _count(self._count_V, new, 1)
        if self._dry:
            self._dry.extend(new)

    def only_sinks(self, ids_C: Ids) -> bool:
        """Whether every token that is no candidate keeps its logit or loses some."""
        options = self._options
        if options.repetition_penalty < 1 or options.presence_penalty < 0 or options.frequency_penalty < 0:
            return False
        return bool(np.isin(self._raised, ids_C).all())

    def penalize(self, kernels: Kernels, logits_N: Floats, ids_N: Ids | None = None) -> None:
        """Change logits in place.

        Args:
            kernels: An ISA level with its threads.
            logits_N: Of these ids, or of the whole vocabulary.
            ids_N: Whose they are; None: N = V, in order.
        """
        if self._dry:
            self._dry.note(kernels, self._dry_V)
        whose: Ids | slice = slice(None) if ids_N is None else ids_N
        kernels.penalize(
            logits_N, self._bias_V[whose], self._seen_V[whose], self._count_V[whose], self._dry_V[whose], self._how
        )

    def _count_seen(self, first: int) -> None:
        """Move the repetition penalty's window to the end of the tokens, of which those before `first` were counted."""
        last_n = self._options.repeat_last_n
        window = len(self._ids) if last_n < 0 else last_n
        begun, begins = max(0, first - window) if last_n >= 0 else 0, max(0, len(self._ids) - window)
        _count(self._seen_V, self._ids[max(first, begins) :], 1)
        _count(self._seen_V, self._ids[begun : min(first, begins)], -1)


def _count(count_V: Ids, tokens: Sequence[int], change: int) -> None:
    for token in tokens:
        if token < len(count_V):
            count_V[token] += change
