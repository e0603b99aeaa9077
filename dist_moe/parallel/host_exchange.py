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
        self._byte = mpi.BYTE
        self._status = mpi.Status()
        self._spin = spin

    def post(self, outgoing_N: Sequence[Bytes | None], incoming_N: Sequence[Bytes | None]) -> Swap:
        """Begin to send one message to each host and to receive one from each; messages of a pair keep their order.

        Args:
            outgoing_N: What each host gets, uint8, C-contiguous, perhaps empty; not to be changed before `finish`.
                None: that host expects no message. The own entry is not read.
            incoming_N: Where each host's message goes, as long as it may become; None: none is expected.
        """
        comm, byte = self.comm, self._byte
        hosts, receives, sends = [], [], []
        for host in self.others:
            incoming = incoming_N[host]
            if incoming is not None:
                hosts.append(host)
                receives.append(comm.Irecv([incoming, byte], host, _TAG))
        for host in self.others:
            outgoing = outgoing_N[host]
            if outgoing is not None:
                sends.append(comm.Isend([outgoing, byte], host, _TAG))
                self.sent_bytes += outgoing.nbytes
        return Swap(self, hosts, receives, sends)

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

    def wait_any(self, requests: list[Any]) -> tuple[int, int]:
        """The place of a receive that has ended (it becomes REQUEST_NULL), and the length of its message in bytes."""
        status, request = self._status, self._mpi.Request
        if self._spin:
            place = request.Waitany(requests, status)
        else:
            started_s = time.perf_counter()
            place, ended = request.Testany(requests, status)
            while not ended:
                self._rest(time.perf_counter() - started_s)
                place, ended = request.Testany(requests, status)
        return int(place), int(status.Get_count(self._byte))

    def wait_all(self, requests: list[Any]) -> None:
        """Until all of some sends have ended."""
        if self._spin:
            self._mpi.Request.Waitall(requests)
            return
        started_s = time.perf_counter()
        while not self._mpi.Request.Testall(requests):
            self._rest(time.perf_counter() - started_s)

    @staticmethod
    def _rest(waited_s: float) -> None:
        if waited_s < _YIELD_S:
            os.sched_yield()
        else:
            time.sleep(min(waited_s / 8, _LONGEST_NAP_S))


class Swap:
    """Messages under way from some hosts and to others."""

    __slots__ = ("_exchange", "_hosts", "_receives", "_sends")

    def __init__(self, exchange: HostExchange, hosts: list[int], receives: list[Any], sends: list[Any]) -> None:
        """Of an exchange: `receives` are from `hosts`."""
        self._exchange = exchange
        self._hosts = hosts
        self._receives = receives
        self._sends = sends

    def finish(self) -> Iterator[tuple[int, int]]:
        """Wait until all have ended; each (host, length in bytes) as its message arrives."""
        exchange, receives = self._exchange, self._receives
        for _ in receives:
            place, length = exchange.wait_any(receives)
            yield self._hosts[place], length
        exchange.wait_all(self._sends)
