"""What a rank's exchanges cost: seconds and bytes, by kind."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class ExchangeTotals:
    """What one kind of exchange cost this rank: seconds inside it, and bytes sent by the model of its method."""

    seconds: float = 0.0
    sent_bytes: int = 0
    calls: int = 0

    def add(self, started_s: float, sent_bytes: int) -> None:
        """Count one call that began at `started_s` on the perf_counter clock."""
        self.seconds += time.perf_counter() - started_s
        self.sent_bytes += sent_bytes
        self.calls += 1


@dataclass
class ExchangeLedger:
    """Seconds and sent bytes of a rank's exchanges by kind; `waiting` is a follower's time between steps."""

    sums: ExchangeTotals = field(default_factory=ExchangeTotals)
    faults: ExchangeTotals = field(default_factory=ExchangeTotals)
    broadcasts: ExchangeTotals = field(default_factory=ExchangeTotals)
    gathers: ExchangeTotals = field(default_factory=ExchangeTotals)
    waiting: ExchangeTotals = field(default_factory=ExchangeTotals)

    @property
    def seconds(self) -> float:
        """Seconds in exchanges inside steps (waiting between steps not included)."""
        return self.sums.seconds + self.faults.seconds + self.broadcasts.seconds + self.gathers.seconds

    @property
    def sent_bytes(self) -> int:
        """Bytes sent by this rank."""
        kinds = (self.sums, self.faults, self.broadcasts, self.gathers, self.waiting)
        return sum(kind.sent_bytes for kind in kinds)
