"""Messages between hosts, each of which one rank speaks for: sizes come with the messages, nothing is counted before.

N hosts
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_moe.parallel.progress import Progress

Bytes = NDArray[np.uint8]

_TAG = 3
# Where ranks share cores, one that has waited so long naps between two looks, at most so long.
_YIELD_S = 2e-3
_LONGEST_NAP_S = 1e-3


class HostExchange:
    """The speakers of the hosts, each of which sends to and receives from every other one.

    Attributes:
        comm: Their communicator.
        hosts: How many there are.
        host: This one's number; hosts are ordered by their lowest rank.
        sent_bytes: Of all messages so far.
        progress: Where this rank is in its work, for the watchdog.
    """

    def __init__(self, comm: Any, mpi: Any, progress: Progress, spin: bool) -> None:
        """Speak for one host of a communicator of which nobody else makes use.

        Args:
            comm: One rank of each host.
            mpi: The mpi4py.MPI module.
            progress: This rank's.
            spin: Whether it may spin while it waits.
        """
        self.comm = comm
        self.hosts: int = comm.size
        self.host: int = comm.rank
        self.others = tuple((self.host + i) % self.hosts for i in range(1, self.hosts))
        self.sent_bytes = 0
        self.progress = progress
        self._mpi = mpi
        self._spin = spin

    def post(self, outgoing_N: Sequence[Bytes | None], incoming_N: Sequence[Bytes | None]) -> Swap:
        """Begin to send one message to each host and to receive one from each; messages of a pair keep their order.

        Args:
            outgoing_N: What each host gets, uint8, C-contiguous, perhaps empty; not to be changed before `finish`.
                None: that host expects no message. The own entry is not read.
            incoming_N: Where each host's message goes, as long as it may become; None: none is expected.
        """
        comm, byte = self.comm, self._mpi.BYTE
        hosts, requests = [], []
        for host in self.others:
            incoming = incoming_N[host]
            if incoming is not None:
                hosts.append(host)
                requests.append(comm.Irecv([incoming, byte], host, _TAG))
        for host in self.others:
            outgoing = outgoing_N[host]
            if outgoing is not None:
                requests.append(comm.Isend([outgoing, byte], host, _TAG))
                self.sent_bytes += outgoing.nbytes
        return Swap(self, hosts, requests)

    def swap(self, outgoing_N: Sequence[Bytes | None], incoming_N: Sequence[Bytes | None]) -> list[int]:
        """Like `post`, and wait for the end.

        Returns:
            The length in bytes of each host's message; 0 where none was expected.
        """
        lengths_N = [0] * self.hosts
        with self.progress.exchanging():
            for host, length in self.post(outgoing_N, incoming_N).finish():
                lengths_N[host] = length
        return lengths_N

    def wait_any(self, requests: list[Any], status: Any) -> int:
        """The place of a request that has ended (it becomes REQUEST_NULL)."""
        if self._spin:
            return int(self._mpi.Request.Waitany(requests, status))
        started_s = time.perf_counter()
        while True:
            place, ended = self._mpi.Request.Testany(requests, status)
            if ended:
                return int(place)
            self._rest(time.perf_counter() - started_s)

    @staticmethod
    def _rest(waited_s: float) -> None:
        if waited_s < _YIELD_S:
            os.sched_yield()
        else:
            time.sleep(min(waited_s / 8, _LONGEST_NAP_S))

    def new_status(self) -> Any:
        """What a request that has ended tells of itself."""
        return self._mpi.Status()

    @property
    def byte(self) -> Any:
        """MPI's byte."""
        return self._mpi.BYTE


class Swap:
    """Messages under way: those from some hosts, then those to others."""

    __slots__ = ("_exchange", "_hosts", "_requests")

    def __init__(self, exchange: HostExchange, hosts: list[int], requests: list[Any]) -> None:
        self._exchange = exchange
        self._hosts = hosts
        self._requests = requests

    def finish(self) -> Iterator[tuple[int, int]]:
        """Wait until all have ended; each (host, length in bytes) as its message arrives."""
        exchange, byte = self._exchange, self._exchange.byte
        status = exchange.new_status()
        for _ in self._requests:
            place = exchange.wait_any(self._requests, status)
            if place < len(self._hosts):
                yield self._hosts[place], int(status.Get_count(byte))
