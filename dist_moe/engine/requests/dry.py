"""DRY: tokens that would prolong a repetition are penalized, exponentially in its length.

The sampler of oobabooga's text-generation-webui (p-e-w, pull request 5677) as llama.cpp refined it, on token ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dist_moe.engine.requests.request import SamplingOptions
from dist_moe.kernels import Kernels

# What no logit survives; beyond it nothing is gained, and float32 ends at 3.4e38.
MOST = 1e30


class Dry:
    """The text of one request, as DRY looks at it."""

    def __init__(self, options: SamplingOptions) -> None:
        """Begin with no tokens."""
        self._options = options
        self._ids = np.empty(1024, dtype=np.int32)
        self._count = 0
        self._after_breaker = 0  # where the text behind the last breaker begins
        self._breakers: dict[int, list[tuple[int, ...]]] = {}  # by their last token
        for breaker in options.dry_breakers:
            self._breakers.setdefault(breaker[-1], []).append(breaker)
        self._noted: list[int] = []
        self._longest = options.dry_allowed_length + _steps_to_most(options)

    def extend(self, ids: Sequence[int]) -> None:
        """Add tokens at the end."""
        if self._count + len(ids) > len(self._ids):
            self._ids = np.resize(self._ids, 2 * (self._count + len(ids)))
        for token in ids:
            self._ids[self._count] = token
            self._count += 1
            if token in self._breakers and any(map(self._ends_with, self._breakers[token])):
                self._after_breaker = self._count

    def note(self, kernels: Kernels, penalty_V: npt.NDArray[np.float32]) -> None:
        """Write every token's penalty for the end of the text as it is now, over what was noted there before."""
        penalty_V[self._noted] = 0
        self._noted = []
        options = self._options
        for token, length in self.repetitions().items():
            if token < len(penalty_V):
                growth = kernels.power(options.dry_base, length - options.dry_allowed_length)
                penalty_V[token] = min(options.dry_multiplier * growth, MOST)
                self._noted.append(token)

    def repetitions(self) -> dict[int, int]:
        """The tokens that would prolong a repetition of the text's end, each with the longest one's length.

        A repetition is at least `dry_allowed_length` long, holds no breaker, and lies in the last `dry_last_n` tokens.
        Those that are penalized by MOST count as the shortest of them.
        """
        options = self._options
        first = 0 if options.dry_last_n < 0 else max(0, self._count - options.dry_last_n)
        ids = self._ids[first : self._count]
        most = min(len(ids), self._count - self._after_breaker, self._longest)
        least = max(1, options.dry_allowed_length)
        if most < least:
            return {}
        ends = np.flatnonzero(ids[:-1] == ids[-1])  # where an earlier occurrence of the last `length` tokens ends
        found: dict[int, int] = {}
        for length in range(1, most + 1):
            if not len(ends):
                break
            longer = (ends >= length) & (ids[ends - length] == ids[-1 - length]) if length < most else ends < 0
            if length >= least:
                found.update(dict.fromkeys(ids[ends[~longer] + 1].tolist(), length))
            ends = ends[longer]
        return found

    def _ends_with(self, breaker: tuple[int, ...]) -> bool:
        if len(breaker) > self._count:
            return False
        return tuple(self._ids[self._count - len(breaker) : self._count].tolist()) == breaker


def _steps_to_most(options: SamplingOptions) -> int:
    """How often the penalty grows until it is MOST; at base 1 never, but 10000 tokens are enough."""
    growth, steps = options.dry_multiplier, 0
    while 0 < growth < MOST and steps < 10_000:
        growth *= options.dry_base
        steps += 1
    return steps
