"""The exchanges of a step where the ranks of a host share memory: through it inside a host, by MPI between hosts.

T tokens · N columns of all ranks · n columns of one rank · W ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dist_moe.parallel.exchange import HEADER_WORDS, PIECE_ELEMENTS, Exchange, byte_run, noted
from dist_moe.parallel.host_sums import HostSums
from dist_moe.parallel.ledger import Kind
from dist_moe.parallel.token_owners import TokenGroups
from dist_moe.parallel.world import World


class NodeChannel(Protocol):
    """Collectives of one host's ranks; its first rank is the root."""

    def sum(self, values: NDArray[np.int64]) -> None:
        """Add in place."""

    def minimum(self, values: NDArray[np.int32]) -> None:
        """Take the lowest in place."""

    def broadcast(self, values: NDArray[Any]) -> None:
        """Give the first rank's array to all in place."""

    def gather(self, own: NDArray[Any]) -> NDArray[Any] | None:
        """Stack the ranks' equal arrays on the first one."""


class NodeExchange(Exchange):
    """Exchanges over all ranks, of which those of one host meet in shared memory; no MPI call inside a host."""

    def __init__(self, world: World, node: NodeChannel, firsts: Any = None, hosts: HostSums | None = None) -> None:
        """Exchange over this world's ranks; collective.

        Args:
            world: All ranks; rank 0 is the first of its host.
            node: This host's shared memory.
            firsts: The communicator of the hosts' first ranks; None on one host, and MPI's null on other ranks.
            hosts: On first ranks, exact sums between hosts; None: by MPI's own sum.
        """
        super().__init__(world, hosts)
        self._node = node
        self._first = world.local_rank == 0
        self._firsts = firsts

    def _sum(self, sums: NDArray[np.int64]) -> None:
        self._node.sum(sums)
        self.ledger.sent(0, sums.nbytes)
        if self._firsts is not None:
            if self._first:
                self._sum_between_hosts(sums)
            self._node.broadcast(sums)

    @noted(Kind.FAULTS)
    def min_faults(self, fault_T: NDArray[np.int32]) -> None:
        """Reduce the tokens' fault flags in place to the lowest over ranks; see Exchange."""
        self._node.minimum(fault_T)
        self.ledger.sent(0, fault_T.nbytes)
        if self._firsts is not None:
            if self._first:
                super().min_faults(fault_T)
            self._node.broadcast(fault_T)

    def _reducing_comm(self) -> Any:
        return self._firsts

    def token_groups(self) -> TokenGroups:
        """Which ranks share memory: those of a host."""
        nodes = self.world.node_of_rank
        members = tuple(
            tuple(rank for rank in range(self.world.size) if nodes[rank] == node) for node in range(self.world.nodes)
        )
        channel = None if self.world.local_size == 1 else self._node
        return TokenGroups(members, tuple(range(len(members))), self.links, channel)

    @noted(Kind.HEADER)
    def post_step(self, header: NDArray[np.int64]) -> None:
        """Leader: wake the other hosts' first ranks by one message each, and the own host's ranks from their futex.

        Args:
            header: int64 [HEADER_WORDS].
        """
        assert len(header) == HEADER_WORDS
        self._send_header(header, [rank for rank, node in self._first_ranks() if node != 0])
        self._node.broadcast(header)

    @noted(Kind.HEADER)
    def wait_step(self, header: NDArray[np.int64]) -> None:
        """Follower: sleep until the leader's next header; only a remote host's first rank polls for it.

        Args:
            header: int64 [HEADER_WORDS], overwritten.
        """
        assert not self.world.is_leader
        if self._first:
            super().wait_step(header)
        self._node.broadcast(header)

    @noted(Kind.BROADCAST)
    def broadcast(self, array: NDArray[Any]) -> None:
        """Give the leader's array to all ranks in place.

        Args:
            array: Any dtype and shape, C-contiguous; the same on all ranks.
        """
        if self._firsts is not None and self._first:
            super().broadcast(array)
        self._node.broadcast(array)
        self.ledger.sent(0, array.nbytes if self._first else 0)

    @noted(Kind.GATHER)
    def gather_columns(
        self, local_Tn: NDArray[np.float32], counts_W: Sequence[int], out_TN: NDArray[np.float32] | None
    ) -> NDArray[np.float32] | None:
        """Put the ranks' columns side by side on the leader; see Exchange."""
        rows, widest = len(local_Tn), max(counts_W)
        step = max(1, PIECE_ELEMENTS // max(1, 4 * widest * self.world.size))
        for first in range(0, rows, step):
            padded_Tn = np.zeros((min(step, rows - first), widest), np.float32)
            padded_Tn[:, : local_Tn.shape[1]] = local_Tn[first : first + step]
            gathered_WTn = self.gather_equal(padded_Tn)
            if gathered_WTn is None or out_TN is None:
                continue
            for rank, stop in enumerate(accumulate(counts_W)):
                out_TN[first : first + step, stop - counts_W[rank] : stop] = gathered_WTn[rank, :, : counts_W[rank]]
        return out_TN

    @noted(Kind.GATHER)
    def gather_equal(self, local: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any] | None:
        """Stack the ranks' equal arrays on the leader; see Exchange."""
        gathered = self._node.gather(local)
        self.ledger.sent(0, 0 if self._first else local.nbytes)
        if gathered is not None and self._firsts is not None:
            gathered = self._gather_hosts(gathered)
        if gathered is not None and out is not None:
            np.copyto(out, gathered)
        return gathered

    def _gather_hosts(self, local: NDArray[Any]) -> NDArray[Any] | None:
        """Stack the hosts' ranks on the leader, in the order of ranks.

        Only first ranks call MPI: a message of another rank might stay in the buffers of an MPI that moves nothing
        while its caller sleeps on a futex.
        """
        _, mpi = self._mpi()
        nodes = np.array(self.world.node_of_rank)
        rank_bytes = local[:1].nbytes
        assert rank_bytes * self.world.size < 1 << 31
        receive, stacked = None, None
        if self.world.is_leader:
            stacked = np.empty((self.world.size, *local.shape[1:]), local.dtype)
            receive = [byte_run(stacked), (np.bincount(nodes) * rank_bytes).tolist(), mpi.BYTE]
        self._firsts.Gatherv([byte_run(local), local.nbytes, mpi.BYTE], receive, root=0)
        self.ledger.sent(0 if self.world.is_leader else local.nbytes)
        return None if stacked is None else stacked[np.argsort(np.argsort(nodes, kind="stable"))]

    def _first_ranks(self) -> list[tuple[int, int]]:
        """(rank, node) of every host's first rank."""
        nodes = self.world.node_of_rank
        return [(nodes.index(node), node) for node in range(self.world.nodes)]
