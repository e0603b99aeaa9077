"""The exchanges of a step whose tokens each have their residual on one rank alone, their owner (NUMERICS 12).

Between hosts each message goes from the first rank of a host to the first rank of another, without a collective: most
messages have a size of their own, which the receiver learns from MPI. Inside a host everything goes through its shared
memory; where that is not to be had, every rank counts as a host of its own.

T tokens · N rows of a list, or groups
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dist_moe.parallel.exchange import Exchange, noted
from dist_moe.parallel.host_exchange import Bytes, Swap
from dist_moe.parallel.ledger import Kind, Ledger
from dist_moe.parallel.token_owners import Owners, RowNumbers, deal_tokens, rows_within

# As of sums (`host_sums`): bounds of messages of `LinkCosts.message_bytes`, and how many go before the first arrives.
# Between 4 hosts at 1 Gbit/s 512 tokens of 2048 columns take 1.1 times as long with 32 KB, 1.5 times with 128 KB.
FEWEST_BYTES = 1 << 14
MOST_BYTES = 1 << 17
AHEAD = 2
SLOTS = AHEAD + 1


class TokenRows(Protocol):
    """Rows of one array or several, a row per token, and how they travel."""

    def bound(self, count: int) -> int:
        """Most bytes of so many rows."""

    def pack(self, out: Bytes, row_N: RowNumbers) -> int:
        """Write some rows as bytes; returns how many bytes."""

    def unpack(self, packed: Bytes, row_N: RowNumbers) -> None:
        """Take some rows from their bytes: sums are added, anything else is overwritten."""


@dataclass(frozen=True)
class _Slot:
    """Room for a message to each group and for one from each."""

    outgoing_N: NDArray[np.uint8]
    incoming_N: NDArray[np.uint8]


class TokenExchange:
    """What ranks say to each other about tokens; every method is collective and called alike by all ranks."""

    def __init__(self, exchange: Exchange) -> None:
        """Over the ranks of an exchange, whose ledger takes the costs."""
        self.world = exchange.world
        self._exchange = exchange
        self._alone = exchange.world.size == 1
        self._groups = exchange.token_groups()
        self._kept_slots: list[_Slot] = []
        self._kept_own = np.empty(0, np.uint8)
        costs = exchange.link_costs
        wanted = FEWEST_BYTES if costs is None else int(costs.message_bytes)
        self._message_bytes = min(MOST_BYTES, max(FEWEST_BYTES, wanted))
        self._owners: dict[int, Owners] = {}
        self._speaks = self.world.rank in {members[0] for members in self._groups.members}
        self._channel = self._groups.channel

    @property
    def ledger(self) -> Ledger:
        """Of all exchanges."""
        return self._exchange.ledger

    @property
    def node_of_group(self) -> tuple[int, ...]:
        """The host of each group."""
        return self._groups.node_of_group

    def owners(self, tokens: int) -> Owners:
        """Who owns which of a step's tokens."""
        if tokens not in self._owners:
            if len(self._owners) > 64:
                self._owners.clear()
            self._owners[tokens] = deal_tokens(tokens, self._groups.members, self.world.rank)
        return self._owners[tokens]

    @noted(Kind.COLLECT)
    def gather(self, rows: TokenRows, owners: Owners) -> None:
        """Give every owner's rows to all ranks.

        Args:
            rows: This rank's own are filled; all are, afterwards.
            owners: Of all rows.
        """
        self._spread(rows, owners, [owners.row_N] * len(owners.groups))

    @noted(Kind.DISPATCH)
    def dispatch(self, rows: TokenRows, owners: Owners, wanted: Sequence[RowNumbers]) -> None:
        """Give owners' rows to the groups that want them.

        Args:
            rows: This rank's own are filled; those that its group wants are, afterwards.
            owners: Of all rows.
            wanted: By group, the rows that it wants, ascending.
        """
        self._spread(rows, owners, wanted)

    @noted(Kind.SCATTER)
    def reduce_scatter(self, sums_TD: NDArray[np.int64], rows: TokenRows, owners: Owners) -> None:
        """Add up all ranks' exact sums; only owners have the result, in their rows.

        Args:
            sums_TD: int64 [T, D], this rank's; other owners' rows are undefined afterwards.
            rows: The same sums as they travel.
            owners: Of all rows.
        """
        everything = [owners.row_N] * len(owners.groups)
        self._collect(sums_TD, rows, owners, everything)

    @noted(Kind.RETURN)
    def give_back(
        self, sums_TD: NDArray[np.int64], rows: TokenRows, owners: Owners, wanted: Sequence[RowNumbers]
    ) -> None:
        """Add up the exact sums of the groups that worked on each token; only its owner has the result, in its row.

        Args:
            sums_TD: int64 [T, D], this rank's, zeros where its group did nothing; other owners' rows are undefined
                afterwards.
            rows: The same sums as they travel.
            owners: Of all rows.
            wanted: By group, the rows that it worked on, ascending.
        """
        self._collect(sums_TD, rows, owners, wanted)

    def _spread(self, rows: TokenRows, owners: Owners, wanted: Sequence[RowNumbers]) -> None:
        """Inside the group to its first rank, from there to the groups, and in each group to all."""
        self._bring_to_first(rows, owners)
        outgoing = [rows_within(row_N, owners.of_group) for row_N in wanted]
        incoming = [rows_within(wanted[owners.group], run) for run in owners.groups]
        self._swap(rows, outgoing, incoming)
        self._show_members(rows, wanted[owners.group])

    def _collect(
        self, sums_TD: NDArray[np.int64], rows: TokenRows, owners: Owners, wanted: Sequence[RowNumbers]
    ) -> None:
        """Inside the group to one sum, from there to the owners' groups, and there to the owners."""
        if self._channel is not None:
            self._channel.sum(sums_TD)
            self.ledger.sent(0, sums_TD.nbytes)
        outgoing = [rows_within(wanted[owners.group], run) for run in owners.groups]
        incoming = [rows_within(row_N, owners.of_group) for row_N in wanted]
        self._swap(rows, outgoing, incoming)
        if self._channel is not None and len(owners.groups) > 1:
            own_TD = sums_TD[owners.of_group.start : owners.of_group.stop]
            self._channel.broadcast(own_TD)
            self.ledger.sent(0, own_TD.nbytes if self._speaks else 0)

    # ---- inside a group ----

    def _bring_to_first(self, rows: TokenRows, owners: Owners) -> None:
        if self._channel is None:
            return
        longest = rows.bound(max(len(run) for run in owners.members))
        packed = self._own_buffer(longest)
        rows.pack(packed, owners.numbers(owners.own))
        gathered = self._channel.gather(packed)
        self.ledger.sent(0, packed.nbytes)
        if gathered is not None:
            for run, found in list(zip(owners.members, gathered, strict=True))[1:]:
                rows.unpack(found[: rows.bound(len(run))], owners.numbers(run))

    def _show_members(self, rows: TokenRows, row_N: RowNumbers) -> None:
        if self._channel is None:
            return
        packed = self._own_buffer(rows.bound(len(row_N)))
        if self._speaks:
            rows.pack(packed, row_N)
        self._channel.broadcast(packed)
        self.ledger.sent(0, packed.nbytes if self._speaks else 0)
        if not self._speaks:
            rows.unpack(packed, row_N)

    # ---- between groups ----

    def _swap(self, rows: TokenRows, outgoing_N: Sequence[RowNumbers], incoming_N: Sequence[RowNumbers]) -> None:
        """Send each other group its rows and take those of all others; on the first ranks.

        Many rows travel in messages that keep the wire busy while the next ones are packed. Both sides of a pair cut
        its rows alike; a pair may be done before the others.
        """
        links = self._groups.links
        if links is None:
            return
        row_bytes = rows.bound(1)
        piece = max(1, self._message_bytes // row_bytes)
        slots = self._slots(piece * row_bytes)
        sent_bytes, pieces = links.sent_bytes, -(-max(map(len, (*outgoing_N, *incoming_N))) // piece)
        swaps: list[Swap] = []
        for turn in range(pieces + AHEAD):
            if turn < pieces:
                swaps.append(self._post(rows, slots[turn % len(slots)], outgoing_N, incoming_N, turn * piece, piece))
            if turn < AHEAD:
                continue
            first = (turn - AHEAD) * piece
            for peer, length in swaps[turn - AHEAD].finish():
                received = slots[(turn - AHEAD) % len(slots)].incoming_N[peer][:length]
                rows.unpack(received, incoming_N[peer][first : first + piece])
        self.ledger.sent(links.sent_bytes - sent_bytes)

    def _post(
        self,
        rows: TokenRows,
        slot: _Slot,
        outgoing_N: Sequence[RowNumbers],
        incoming_N: Sequence[RowNumbers],
        first: int,
        count: int,
    ) -> Swap:
        links = self._groups.links
        assert links is not None
        packed_N: list[Bytes | None] = [None] * links.hosts
        room_N: list[Bytes | None] = [None] * links.hosts
        for peer in links.others:
            if len(row_N := outgoing_N[peer][first : first + count]):
                packed_N[peer] = slot.outgoing_N[peer][: rows.pack(slot.outgoing_N[peer], row_N)]
            if len(incoming_N[peer]) > first:
                room_N[peer] = slot.incoming_N[peer]
        return links.post(packed_N, room_N)

    def _slots(self, size: int) -> list[_Slot]:
        """Memory for the messages under way, `size` bytes each; it grows to the longest."""
        if not self._kept_slots or self._kept_slots[0].incoming_N.shape[1] < size:
            shape = (len(self._groups.members), size)
            self._kept_slots = [_Slot(np.empty(shape, np.uint8), np.empty(shape, np.uint8)) for _ in range(SLOTS)]
        return self._kept_slots

    def _own_buffer(self, size: int) -> Bytes:
        """Memory for what goes through the group's shared memory; it grows with it."""
        if self._kept_own.size < size:
            self._kept_own = np.empty(size, np.uint8)
        return self._kept_own[:size]
