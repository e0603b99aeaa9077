"""Exact sums over hosts, packed: each host's own sums go to all others, or each host adds up one part of them.

N hosts
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dist_moe.errors import EnvironmentMismatch
from dist_moe.parallel.host_exchange import Bytes, HostExchange
from dist_moe.parallel.probe import LinkCosts

Sums = NDArray[np.int64]

# Sums travel in pieces of this many, so that packing, the wire and adding overlap and buffers stay small.
PIECE_SUMS = 32768
# A part is whole blocks of what the codecs treat as one.
_BLOCK = 32
# Where sums are rounded on their way, what a sum becomes must not depend on measured costs.
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
        # Three pieces are under way at most.
        self._out = np.empty((3, N, partial.bound(PIECE_SUMS)), np.uint8)
        self._in = np.empty((3, N, partial.bound(PIECE_SUMS)), np.uint8)

    def is_one_phase(self, count: int) -> bool:
        """Whether `count` sums are added up on every host, which takes one phase of messages instead of two."""
        N, partial, finished = self.exchange.hosts, self._partial, self._finished
        one_bytes = (N - 1) * count * partial.value_bytes
        two_bytes = (N - 1) * count * (partial.value_bytes + finished.value_bytes) / N
        if partial.rounds:
            return one_bytes <= two_bytes or one_bytes <= _SMALL_ROUNDED_BYTES
        return self.costs.seconds(1, one_bytes) <= self.costs.seconds(2, two_bytes)

    def sum(self, sums: Sums) -> None:
        """Add up in place; every host ends with the same values, which are used as the same numbers (NUMERICS 7).

        Args:
            sums: int64, C-contiguous, any shape; the same on all hosts.
        """
        flat = sums.reshape(-1)
        pieces = [flat[first : first + PIECE_SUMS] for first in range(0, flat.size, PIECE_SUMS)]
        phases = self._one_phase if self.is_one_phase(flat.size) else self._two_phases
        under_way = [phases(piece, place % 3) for place, piece in enumerate(pieces)]
        # One step of each of three pieces in turn: the wire has work while this rank packs and adds.
        for turn in range(len(pieces) + 2):
            for place in range(turn, max(-1, turn - 3), -1):
                if place < len(pieces):
                    next(under_way[place], None)

    def _one_phase(self, sums: Sums, slot: int) -> Iterator[None]:
        """Everyone gets everyone's own sums."""
        own = self._encode(self._partial, self._out[slot, 0], sums)
        swap = self.exchange.post([own] * self.exchange.hosts, list(self._in[slot]))
        if self._partial.rounds:
            self._decode(self._partial, sums, own)
        yield
        for host, length in swap.finish():
            self._decode(self._partial, sums, self._in[slot, host, :length], add=True)

    def _two_phases(self, sums: Sums, slot: int) -> Iterator[None]:
        """Everyone gets one part of everyone's own sums, adds it up, and gives it to all."""
        yield from self._reduce(sums, slot)
        parts, own = self._parts(sums), self.exchange.host
        done = self._encode(self._finished, self._out[slot, own], parts[own])
        swap = self.exchange.post([done] * len(parts), list(self._in[slot]))
        self._decode(self._finished, parts[own], done)  # the same values as everyone else
        yield
        for host, length in swap.finish():
            self._decode(self._finished, parts[host], self._in[slot, host, :length])

    def _reduce(self, sums: Sums, slot: int) -> Iterator[None]:
        parts, own = self._parts(sums), self.exchange.host
        rounds = self._partial.rounds
        outgoing_N = [
            self._encode(self._partial, self._out[slot, host], part) if rounds or host != own else None
            for host, part in enumerate(parts)
        ]
        swap = self.exchange.post(outgoing_N, list(self._in[slot]))
        if (rounded := outgoing_N[own]) is not None:
            self._decode(self._partial, parts[own], rounded)
        yield
        for host, length in swap.finish():
            self._decode(self._partial, parts[own], self._in[slot, host, :length], add=True)

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
