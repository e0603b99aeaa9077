"""The exchanges of a step, each on every rank in the same order. One rank exchanges nothing and pays nothing.

T tokens · D model dim · N columns of all ranks · n columns of one rank · W ranks
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from dist_moe.parallel.cost import LinkCosts
from dist_moe.parallel.host_exchange import HostExchange
from dist_moe.parallel.host_sums import HostSums
from dist_moe.parallel.ledger import Kind, Ledger
from dist_moe.parallel.progress import Progress
from dist_moe.parallel.token_owners import TokenGroups
from dist_moe.parallel.world import World

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

HEADER_WORDS = 16

# MPI counts are C ints: longer arrays travel in pieces of this many elements.
PIECE_ELEMENTS = 1 << 29

_HEADER_TAG = 1
_COLUMNS_TAG = 2
_SPIN_S = 200e-6
_LONGEST_NAP_S = 2e-3


def noted(
    kind: Kind,
) -> Callable[[Callable[Concatenate[Any, Parameters], Result]], Callable[Concatenate[Any, Parameters], Result]]:
    """Decorate an exchange of all ranks: its two ends go into the ledger.

    The watchdog learns that the rank waits for others and does not compute.
    """

    def decorate(
        method: Callable[Concatenate[Any, Parameters], Result],
    ) -> Callable[Concatenate[Any, Parameters], Result]:
        @functools.wraps(method)
        def entered(self: Any, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            if self._alone:
                return method(self, *args, **kwargs)
            progress: Progress = self.world.progress
            ledger: Ledger = self.ledger
            progress.exchanges += 1
            progress.waiting += 1
            ledger.begin()
            try:
                return method(self, *args, **kwargs)
            finally:
                ledger.end(kind)
                progress.waiting -= 1

        return entered

    return decorate


class Exchange:
    """The collectives of a step over a world's ranks, by buffer protocol (nothing is pickled).

    Attributes:
        ledger: When each exchange of this rank began and ended, and what it sent.
        hosts: Exact sums between hosts, on the ranks that speak for one; None: by MPI's own sum.
        links: Messages between those ranks; None on one host and on ranks that do not speak for theirs.
        link_costs: Of messages between hosts, equal on all ranks; None on one host.
    """

    def __init__(self, world: World, hosts: HostSums | None = None) -> None:
        """Exchange over this world's ranks.

        Args:
            world: All ranks.
            hosts: Between the ranks that sum by MPI, each of which counts as a host.
        """
        self.world = world
        self.hosts = hosts
        self.links: HostExchange | None = None
        self.link_costs: LinkCosts | None = None
        self.ledger = Ledger(world.progress)
        self._alone = world.size == 1

    @noted(Kind.SUMS)
    def sum_exact(self, sums: NDArray[np.int64]) -> None:
        """Add the ranks' fixed-point sums in place: associative, so ranks and algorithm do not matter (NUMERICS 7).

        Args:
            sums: int64, C-contiguous, any shape; the same shape on all ranks.
        """
        if not self._alone:
            self._sum(sums)

    @noted(Kind.FAULTS)
    def min_faults(self, fault_T: NDArray[np.int32]) -> None:
        """Reduce the tokens' fault flags in place to the lowest over ranks (NUMERICS 15).

        Args:
            fault_T: int32, C-contiguous.
        """
        if not self._alone:
            self._allreduce(fault_T, np.int32, "MIN")

    def _sum(self, sums: NDArray[np.int64]) -> None:
        self._sum_between_hosts(sums)

    def _sum_between_hosts(self, sums: NDArray[np.int64]) -> None:
        if self.hosts is None:
            self._allreduce(sums, np.int64, "SUM")
            return
        sent_bytes = self.hosts.exchange.sent_bytes
        self.hosts.sum(sums)
        self.ledger.sent(self.hosts.exchange.sent_bytes - sent_bytes)

    def _allreduce(self, array: NDArray[Any], dtype: type[np.generic], operation: str) -> None:
        _, mpi = self._mpi()
        comm = self._reducing_comm()
        kind = mpi.INT64_T if dtype is np.int64 else mpi.INT32_T
        for piece in _pieces(array, dtype):
            comm.Allreduce(mpi.IN_PLACE, [piece, kind], getattr(mpi, operation))
        self.ledger.sent(2 * array.nbytes * (comm.size - 1) // comm.size)

    def _reducing_comm(self) -> Any:
        """The ranks that reduce and broadcast by MPI."""
        return self._mpi()[0]

    def token_groups(self) -> TokenGroups:
        """Which ranks share memory, for exchanges of tokens: here none do."""
        members = tuple((rank,) for rank in range(self.world.size))
        links = self.links
        if links is None and not self._alone:  # ranks of one host
            links = HostExchange(*self._mpi(), self.world.progress, spin=False)
        return TokenGroups(members, self.world.node_of_rank, links, None)

    @noted(Kind.HEADER)
    def post_step(self, header: NDArray[np.int64]) -> None:
        """Leader: wake the followers with the next step's header.

        Args:
            header: int64 [HEADER_WORDS].
        """
        if self._alone:
            return
        assert self.world.is_leader
        self._send_header(header, range(1, self.world.size))

    def _send_header(self, header: NDArray[np.int64], ranks: Sequence[int]) -> None:
        if not ranks:
            return
        comm, mpi = self._mpi()
        message = [_whole(header, np.int64, HEADER_WORDS), mpi.INT64_T]
        # 128 bytes go eagerly: the request ends when the message is copied, whatever the follower is doing.
        mpi.Request.Waitall([comm.Isend(message, rank, _HEADER_TAG) for rank in ranks])
        self.ledger.sent(header.nbytes * len(ranks))

    @noted(Kind.HEADER)
    def wait_step(self, header: NDArray[np.int64]) -> None:
        """Follower: wait for the leader's next header: spin briefly, then nap for a quarter of the wait, at most 2 ms.

        Args:
            header: int64 [HEADER_WORDS], overwritten.
        """
        assert not self.world.is_leader
        comm, mpi = self._mpi()
        started_s = time.perf_counter()
        request = comm.Irecv([_whole(header, np.int64, HEADER_WORDS), mpi.INT64_T], 0, _HEADER_TAG)
        while not request.Test():
            waited_s = time.perf_counter() - started_s
            if waited_s < _SPIN_S:
                os.sched_yield()
            else:
                time.sleep(min(waited_s / 4, _LONGEST_NAP_S))

    @noted(Kind.BROADCAST)
    def broadcast(self, array: NDArray[Any]) -> None:
        """Give the leader's array to all ranks in place.

        Args:
            array: Any dtype and shape, C-contiguous; the same on all ranks.
        """
        if self._alone:
            return
        _, mpi = self._mpi()
        comm = self._reducing_comm()
        for piece in _pieces(byte_run(array), np.uint8):
            comm.Bcast([piece, mpi.BYTE], root=0)
        self.ledger.sent(array.nbytes * (comm.size - 1) if self.world.is_leader else 0)

    @noted(Kind.GATHER)
    def gather_columns(
        self,
        local_Tn: NDArray[np.float32],
        counts_W: Sequence[int],
        out_TN: NDArray[np.float32] | None,
    ) -> NDArray[np.float32] | None:
        """Put the ranks' columns side by side on the leader, in rank order.

        Args:
            local_Tn: f32 [T, counts_W[rank]], C-contiguous; T is the same on all ranks.
            counts_W: Columns per rank; may hold zeros.
            out_TN: Leader: f32 [T, sum(counts_W)], C-contiguous, overwritten; not used by one rank alone. Others: None.

        Returns:
            Leader: out_TN (one rank alone: local_Tn itself, nothing is copied). Others: None.
        """
        if self._alone:
            return local_Tn
        starts_W = [0, *accumulate(counts_W)]
        rows = local_Tn.shape[0]
        step = max(1, PIECE_ELEMENTS // max(1, starts_W[-1]))
        for first in range(0, rows, step):
            if out_TN is None:
                self._send_columns(local_Tn[first : first + step])
            else:
                self._receive_columns(out_TN[first : first + step], local_Tn[first : first + step], starts_W)
        self.ledger.sent(0 if self.world.is_leader else local_Tn.nbytes)
        return out_TN

    def _send_columns(self, local_Tn: NDArray[np.float32]) -> None:
        comm, mpi = self._mpi()
        if local_Tn.size:
            comm.Send([_whole(local_Tn, np.float32, local_Tn.size), mpi.FLOAT], 0, _COLUMNS_TAG)

    def _receive_columns(self, out_TN: NDArray[np.float32], local_Tn: NDArray[np.float32], starts_W: list[int]) -> None:
        """Receive every rank's columns straight into their place: a vector of T runs of n, N apart."""
        comm, mpi = self._mpi()
        rows, columns = out_TN.shape
        flat = _whole(out_TN, np.float32, rows * columns)
        requests, kinds = [], []
        for rank in range(1, self.world.size):
            width = starts_W[rank + 1] - starts_W[rank]
            if rows and width:
                kind = mpi.FLOAT.Create_vector(rows, width, columns).Commit()
                requests.append(comm.Irecv([flat[starts_W[rank] :], 1, kind], rank, _COLUMNS_TAG))
                kinds.append(kind)
        out_TN[:, : starts_W[1]] = local_Tn
        mpi.Request.Waitall(requests)
        for kind in kinds:
            kind.Free()

    @noted(Kind.GATHER)
    def gather_equal(self, local: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any] | None:
        """Stack the ranks' equal arrays on the leader.

        Args:
            local: Any dtype, C-contiguous; the same shape on all ranks; small (all together < 2 GiB).
            out: Leader: [W, *local.shape] to fill; a new array when None.

        Returns:
            Leader: [W, *local.shape]. Others: None.
        """
        if self._alone:
            return local[np.newaxis]
        comm, mpi = self._mpi()
        assert local.nbytes * self.world.size < 1 << 31
        if self.world.is_leader and out is None:
            out = np.empty((self.world.size, *local.shape), local.dtype)
        receive = None if out is None else [byte_run(out), local.nbytes, mpi.BYTE]
        comm.Gather([byte_run(local), local.nbytes, mpi.BYTE], receive, root=0)
        self.ledger.sent(0 if self.world.is_leader else local.nbytes)
        return out

    def _mpi(self) -> tuple[Any, Any]:
        assert self.world.comm is not None
        assert self.world.mpi is not None
        return self.world.comm, self.world.mpi


def _whole(array: NDArray[Any], dtype: type[np.generic] | np.dtype[Any], size: int) -> NDArray[Any]:
    """The array as one flat run of `size` elements without a copy."""
    assert array.dtype == dtype
    assert array.size == size
    assert array.flags.c_contiguous
    return array.reshape(-1)


def byte_run(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The array's bytes as one flat run without a copy."""
    return _whole(array, array.dtype, array.size).view(np.uint8)


def _pieces(array: NDArray[Any], dtype: type[np.generic]) -> Iterator[NDArray[Any]]:
    """Flat runs of at most PIECE_ELEMENTS elements that cover the array, without copies."""
    flat = _whole(array, dtype, array.size)
    for first in range(0, flat.size, PIECE_ELEMENTS):
        yield flat[first : first + PIECE_ELEMENTS]
