"""The exchanges of a step whose tokens each have their residual on one rank alone, their owner (NUMERICS 12).

Between hosts each message goes from the first rank of a host to the first rank of another, without a collective: most
messages have a size of their own, which the receiver learns from MPI. Inside a host everything goes through its shared
memory; where that is not to be had, every rank counts as a host of its own.

T tokens · N rows of a list
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dist_moe.parallel.exchange import Exchange, noted
from dist_moe.parallel.ledger import Kind, Ledger
from dist_moe.parallel.token_owners import Owners, RowNumbers, deal_tokens, numbers, rows_within

Bytes = NDArray[np.uint8]

# A message is cut into pieces of about so many bytes: MPI counts are C ints.
PIECE_BYTES = 1 << 28

_TAG = 11


class TokenRows(Protocol):
    """Rows of one array or several, a row per token, and how they travel."""

    def bound(self, count: int) -> int:
        """Most bytes of so many rows."""

    def pack(self, out: Bytes, row_N: RowNumbers) -> int:
        """Write some rows as bytes; returns how many bytes."""

    def unpack(self, packed: Bytes, row_N: RowNumbers) -> None:
        """Take some rows from their bytes: sums are added, anything else is overwritten."""


class TokenExchange:
    """What ranks say to each other about tokens; every method is collective and called alike by all ranks."""

    def __init__(self, exchange: Exchange) -> None:
        """Over the ranks of an exchange, whose ledger takes the costs."""
        self.world = exchange.world
        self._exchange = exchange
        self._alone = exchange.world.size == 1
        self._groups = exchange.token_groups()
        self._buffers: dict[tuple[str, int], Bytes] = {}
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
        self._spread(rows, owners, [numbers(range(owners.count))] * len(owners.groups))

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
        everything = [numbers(range(owners.count))] * len(owners.groups)
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
        packed = self._buffer("own", 0, longest)
        rows.pack(packed, numbers(owners.own))
        gathered = self._channel.gather(packed)
        self.ledger.sent(0, packed.nbytes)
        if gathered is not None:
            for run, found in list(zip(owners.members, gathered, strict=True))[1:]:
                rows.unpack(found[: rows.bound(len(run))], numbers(run))

    def _show_members(self, rows: TokenRows, row_N: RowNumbers) -> None:
        if self._channel is None:
            return
        packed = self._buffer("own", 0, rows.bound(len(row_N)))
        if self._speaks:
            rows.pack(packed, row_N)
        self._channel.broadcast(packed)
        self.ledger.sent(0, packed.nbytes if self._speaks else 0)
        if not self._speaks:
            rows.unpack(packed, row_N)

    # ---- between groups ----

    def _swap(self, rows: TokenRows, outgoing: Sequence[RowNumbers], incoming: Sequence[RowNumbers]) -> None:
        """Send each other group its rows and take those of all others; on the first ranks."""
        if self._groups.firsts is None:
            return
        most = max(1, PIECE_BYTES // rows.bound(1))
        # Both sides of a message know how many pieces it has; a pair may be done before the others.
        for first in range(0, max(len(row_N) for row_N in (*outgoing, *incoming)), most):
            piece = slice(first, first + most)
            self._swap_piece(rows, [row_N[piece] for row_N in outgoing], [row_N[piece] for row_N in incoming])

    def _swap_piece(self, rows: TokenRows, outgoing: Sequence[RowNumbers], incoming: Sequence[RowNumbers]) -> None:
        firsts, mpi = self._groups.firsts, self.world.mpi
        assert mpi is not None
        peers = [(firsts.rank + distance) % firsts.size for distance in range(1, firsts.size)]
        senders = [peer for peer in reversed(peers) if len(incoming[peer])]
        buffers = [self._buffer("in", peer, rows.bound(len(incoming[peer]))) for peer in senders]
        receiving = [
            firsts.Irecv([buffer, mpi.BYTE], peer, _TAG) for peer, buffer in zip(senders, buffers, strict=True)
        ]
        sending = []
        for peer in peers:
            if len(outgoing[peer]):
                buffer = self._buffer("out", peer, rows.bound(len(outgoing[peer])))
                used = rows.pack(buffer, outgoing[peer])
                sending.append(firsts.Isend([buffer[:used], mpi.BYTE], peer, _TAG))
                self.ledger.sent(used)
        status = mpi.Status()
        for _ in senders:
            place = mpi.Request.Waitany(receiving, status)
            rows.unpack(buffers[place][: status.Get_count(mpi.BYTE)], incoming[senders[place]])
        mpi.Request.Waitall(sending)

    def _buffer(self, purpose: str, peer: int, size: int) -> Bytes:
        """Memory that is kept for its purpose and grows with it."""
        found = self._buffers.get((purpose, peer))
        if found is None or found.size < size:
            found = self._buffers[purpose, peer] = np.empty(size, np.uint8)
        return found[:size]
