"""Exact sums over hosts, packed: each host's own sums go to all others, or each host adds up one part of them.

N hosts
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dist_moe.errors import EnvironmentMismatch
from dist_moe.parallel.cost import LinkCosts
from dist_moe.parallel.host_exchange import Bytes, HostExchange

Sums = NDArray[np.int64]

# Bounds of messages of `LinkCosts.message_bytes`. A message costs a rank 30 us. Over 1 Gbit/s (tbf, burst 16 KB)
# 18 KB at a time reach its rate, 150 KB 3/4 of it.
FEWEST_SUMS = 4096
MOST_SUMS = 16384
# Pieces that are sent before the first of them must have arrived.
AHEAD = 3
SLOTS = 2 * AHEAD + 1
# A part is whole blocks of what the codecs treat as one.
_BLOCK = 32
# Up to so many bytes of rounded sums go to every host.
_SMALL_ROUNDED_BYTES = 32768


class Codec(Protocol):
    """A form of sums as bytes."""

    rounds: bool
    value_bytes: float

    def bound(self, count: int) -> int:
        """Most bytes of `count` sums."""

    def encode(self, out: Bytes, values: Sums) -> int:
        """Write the values' bytes and return how many."""

    def decode(self, sums: Sums, encoded: Bytes, add: bool = False) -> int:
        """Read sums, into or onto the array, and return the bytes read, 0 if they are damaged."""


class HostSums:
    """Sums over the speakers of hosts.

    Attributes:
        exchange: Their messages.
        costs: What the choice between one phase and two goes by; equal on all hosts.
        message_sums: Sums in a message, where many travel.
        one_phase: Whether sums take one phase, where that is to be compared; None: as `is_one_phase` finds.
    """

    def __init__(self, exchange: HostExchange, partial: Codec, finished: Codec, costs: LinkCosts) -> None:
        """Sum over hosts.

        Args:
            exchange: The hosts' speakers.
            partial: How a host's own sums travel.
            finished: How sums travel that nothing is added to any more.
            costs: Of the links between the hosts; the same on all.
        """
        self.exchange = exchange
        self.costs = costs
        self._partial = partial
        self._finished = finished
        N = exchange.hosts
        shape = (N, max(partial.bound(MOST_SUMS), finished.bound(MOST_SUMS)))
        self._out = [list(np.empty(shape, np.uint8)) for _ in range(SLOTS)]
        self._in = [list(np.empty(shape, np.uint8)) for _ in range(SLOTS)]
        wanted = int(costs.message_bytes / partial.value_bytes) // _BLOCK * _BLOCK
        self.message_sums = min(MOST_SUMS, max(FEWEST_SUMS, wanted))
        self.one_phase: bool | None = None
        self._one_phase_for: dict[int, bool] = {}

    def is_one_phase(self, count: int) -> bool:
        """Whether `count` sums are added up on every host, which takes one phase of messages instead of two."""
        if self.one_phase is not None:
            return self.one_phase
        if not self._partial.rounds:
            # Two hosts: the bytes are about the same, and no sum is packed twice.
            return self.exchange.hosts == 2 or self._expected_s(count, 1) <= self._expected_s(count, 2)
        # What rounding makes of a sum must not depend on measured costs.
        one_bytes = self._sent_bytes(count, 1)
        return one_bytes <= self._sent_bytes(count, 2) or one_bytes <= _SMALL_ROUNDED_BYTES

    def expected_s(self, count: int) -> float:
        """What a sum of `count` costs by the links' costs: latencies, and bytes by rate."""
        return self._expected_s(count, 1 if self.is_one_phase(count) else 2)

    def _expected_s(self, count: int, phases: int) -> float:
        return self.costs.seconds(phases, self._sent_bytes(count, phases))

    def _sent_bytes(self, count: int, phases: int) -> float:
        N, own, finished = self.exchange.hosts, self._partial.value_bytes, self._finished.value_bytes
        return (N - 1) * count * (own if phases == 1 else (own + finished) / N)

    def sum(self, sums: Sums) -> None:
        """Add up in place; every host ends with the same values, which are used as the same numbers (NUMERICS 7).

        Args:
            sums: int64, C-contiguous, any shape; the same on all hosts.
        """
        flat = sums.reshape(-1)
        count = flat.size
        if count not in self._one_phase_for:
            self._one_phase_for[count] = self.is_one_phase(count)
        one_phase = self._one_phase_for[count]
        phases = self._one_phase if one_phase else self._two_phases
        parts = 1 if one_phase else self.exchange.hosts
        piece = parts * self.message_sums
        if count <= piece:
            for _ in phases(flat, 0):
                pass
            return
        under_way = [
            phases(flat[first : first + piece], place % SLOTS) for place, first in enumerate(range(0, count, piece))
        ]
        # The wire has work while this rank packs and adds: each piece's next phase comes AHEAD pieces later.
        for turn in range(len(under_way) + 2 * AHEAD):
            for place in (turn, turn - AHEAD, turn - 2 * AHEAD):
                if 0 <= place < len(under_way):
                    next(under_way[place], None)

    def _one_phase(self, sums: Sums, slot: int) -> Iterator[None]:
        """Everyone gets everyone's own sums."""
        own = self._encode(self._partial, self._out[slot][0], sums)
        swap = self.exchange.post([own] * self.exchange.hosts, self._in[slot])
        if self._partial.rounds:
            self._decode(self._partial, sums, own)
        yield
        for host, length in swap.finish():
            self._decode(self._partial, sums, self._in[slot][host][:length], add=True)

    def _two_phases(self, sums: Sums, slot: int) -> Iterator[None]:
        """Everyone gets one part of everyone's own sums, adds it up, and gives it to all."""
        parts, own = self._parts(sums), self.exchange.host
        yield from self._reduce(parts, slot)
        done = self._encode(self._finished, self._out[slot][own], parts[own])
        swap = self.exchange.post([done] * len(parts), self._in[slot])
        self._decode(self._finished, parts[own], done)  # the same values as everyone else
        yield
        for host, length in swap.finish():
            self._decode(self._finished, parts[host], self._in[slot][host][:length])

    def _reduce(self, parts: list[Sums], slot: int) -> Iterator[None]:
        own, rounds = self.exchange.host, self._partial.rounds
        outgoing_N = [
            self._encode(self._partial, self._out[slot][host], part) if rounds or host != own else None
            for host, part in enumerate(parts)
        ]
        swap = self.exchange.post(outgoing_N, self._in[slot])
        if (rounded := outgoing_N[own]) is not None:
            self._decode(self._partial, parts[own], rounded)
        yield
        for host, length in swap.finish():
            self._decode(self._partial, parts[own], self._in[slot][host][:length], add=True)

    def _parts(self, sums: Sums) -> list[Sums]:
        """Each host's part: whole blocks, perhaps none."""
        N, blocks = self.exchange.hosts, -(-sums.size // _BLOCK)
        ends = [blocks * host // N * _BLOCK for host in range(N)] + [sums.size]
        return [sums[ends[host] : ends[host + 1]] for host in range(N)]

    @staticmethod
    def _encode(codec: Codec, out: Bytes, values: Sums) -> Bytes:
        return out[: codec.encode(out, values)]

    def _decode(self, codec: Codec, sums: Sums, encoded: Bytes, add: bool = False) -> None:
        if codec.decode(sums, encoded, add) != encoded.size:
            raise EnvironmentMismatch(
                f"{encoded.size} bytes from another host are no {sums.size} packed sums: the network or that host's "
                "memory is damaged; check both and start again"
            )
