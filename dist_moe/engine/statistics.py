"""Where a run's time went, over all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.model.stopwatch import Part, Stopwatch


@dataclass
class Clock:
    """Tokens and seconds that rank 0 counted.

    A step's time counts as prefill if it has prompt tokens, else as decode. `stopwatch` divides it further.
    """

    stopwatch: Stopwatch
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    steps: int = 0
    reused_tokens: int = 0

    @contextmanager
    def step(self, prompt_tokens: int, decoded_tokens: int) -> Iterator[None]:
        """Count a step and the time until the block's end."""
        self.stopwatch.start()
        started_s = time.perf_counter()
        yield
        elapsed_s = time.perf_counter() - started_s
        self.steps += 1
        self.prefill_tokens += prompt_tokens
        self.decode_tokens += decoded_tokens
        if prompt_tokens:
            self.prefill_s += elapsed_s
        else:
            self.decode_s += elapsed_s
        self.stopwatch.mark(Part.SAMPLING)
        self.stopwatch.finish(prompt_tokens, decoded_tokens)


@dataclass(frozen=True)
class EngineStatistics:
    """A run in numbers.

    Seconds per rank in steps are split in three: `exchange_s` is what the rank that waited least spent in collectives,
    `waiting_s` is what the others spent there beyond that (mean over ranks), `compute_s` is the rest (mean).
    `sent_bytes` is the sum over ranks. `reused_tokens` of prompts were not computed; `prefill_tokens` were.
    """

    load_s: float
    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float
    steps: int
    compute_s: float
    waiting_s: float
    exchange_s: float
    sent_bytes: int
    reused_tokens: int = 0


def summarize(load_s: float, clock: Clock, ranks_R3: npt.NDArray[np.float64]) -> EngineStatistics:
    """Combine the ranks' ledgers.

    Args:
        load_s: Seconds from the engine's start to its readiness on rank 0.
        clock: Rank 0's counts.
        ranks_R3: Per rank: seconds in steps, seconds in collectives, bytes sent.
    """
    step_s, collective_s, sent_bytes = ranks_R3.T
    exchange_s = float(collective_s.min())
    return EngineStatistics(
        load_s=load_s,
        prefill_tokens=clock.prefill_tokens,
        prefill_s=clock.prefill_s,
        decode_tokens=clock.decode_tokens,
        decode_s=clock.decode_s,
        steps=clock.steps,
        compute_s=float((step_s - collective_s).mean()),
        waiting_s=float(collective_s.mean()) - exchange_s,
        exchange_s=exchange_s,
        sent_bytes=int(sent_bytes.sum()),
        reused_tokens=clock.reused_tokens,
    )
