"""Where a run's time went, over all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dist_moe.engine.watch.accounts import Accounts, Floats
from dist_moe.model.stopwatch import Part, Stopwatch
from dist_moe.parallel.ledger import Ledger


@dataclass
class Clock:
    """Tokens and seconds that rank 0 counted.

    A step's time counts as prefill if it has prompt tokens, else as decode. `stopwatch` divides it further, and the
    ledger's notes go by the same rule.
    """

    stopwatch: Stopwatch
    ledger: Ledger
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
        self.ledger.step_tokens = (prompt_tokens, decoded_tokens)
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
        self.ledger.step_tokens = None
        self.ledger.end_draw()
        self.stopwatch.mark(Part.SAMPLING)
        self.stopwatch.finish(prompt_tokens, decoded_tokens)


@dataclass(frozen=True)
class EngineStatistics:
    """A run in numbers.

    Seconds per rank in steps are split in three, as means over ranks: `waiting_s` for the last rank to come to an
    exchange, `exchange_s` for moving the bytes, `compute_s` for the rest; `accounts.py` has the exact words.
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


def summarize(load_s: float, clock: Clock, accounts: Accounts) -> EngineStatistics:
    """A run's numbers.

    Args:
        load_s: Seconds from the engine's start to its readiness on rank 0.
        clock: Rank 0's counts.
        accounts: All ranks' times and bytes.
    """
    return EngineStatistics(
        load_s=load_s,
        prefill_tokens=clock.prefill_tokens,
        prefill_s=clock.prefill_s,
        decode_tokens=clock.decode_tokens,
        decode_s=clock.decode_s,
        steps=clock.steps,
        compute_s=_mean_s(accounts.compute_PRW),
        waiting_s=_mean_s(accounts.wait_PRK),
        exchange_s=_mean_s(accounts.wire_PRK),
        sent_bytes=accounts.sent_bytes,
        reused_tokens=clock.reused_tokens,
    )


def _mean_s(seconds_PRX: Floats) -> float:
    """All seconds of a rank, as a mean over ranks."""
    return float(seconds_PRX.sum()) / int(seconds_PRX.shape[1])
