"""The ranks of a job: who and where they are, and how they agree on an error so that all end alike."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn, cast

import numpy as np

from dist_moe.errors import DistMoeError, UsageError
from dist_moe.parallel.launcher import Launcher
from dist_moe.parallel.mpi import abort, short_version, start_mpi, world_communicator
from dist_moe.parallel.progress import Progress
from dist_moe.parallel.shared_names import forget_shared_names

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm as Intracomm

# Between two looks of a rank that waits for a long piece of work elsewhere.
_NAP_S = 0.02


class AgreedError(DistMoeError):
    """An error of at least one rank that all ranks know of, so that all leave alike with the same code.

    Attributes:
        lines: The distinct sentences, each with its hosts when not all ranks say it.
        exit_code: The highest exit code of the ranks' errors.
    """

    agreed = True

    def __init__(self, lines: tuple[str, ...], exit_code: int) -> None:
        """Carry the merged lines and the highest code."""
        super().__init__("\n".join(lines))
        self.lines = lines
        self.exit_code = exit_code


class UnfinishedStepError(Exception):
    """A planned error inside a step, where the other ranks wait in a collective: it cannot be agreed, only abort."""

    def __init__(self, error: DistMoeError) -> None:
        """Keep the error that it stands for."""
        super().__init__(str(error))
        self.error = error


class World:
    """All ranks of a job; without a launcher one rank and no MPI (`comm` is None), with the same interface.

    Attributes:
        mpi: The mpi4py.MPI module, or None.
        comm: This package's own communicator, or None.
        rank, size: This rank and the number of ranks.
        hosts: Host name of every rank, by rank.
        node, nodes: Index of this rank's node (ranks that share memory), by lowest rank, and number of nodes.
        node_of_rank: Node index of every rank, by rank.
        local_rank, local_size: This rank's place among its node's ranks.
        library: The MPI library and its version on one line, "none" without MPI.
        progress: Where this rank is in its work, for the watchdog.
    """

    def __init__(self, mpi: ModuleType | None = None, comm: Intracomm | None = None) -> None:
        """Join the ranks of a communicator, or all of a started MPI (collective), or be one rank without MPI."""
        self.mpi = mpi
        self.comm: Intracomm | None = None
        self.rank, self.size = 0, 1
        self.hosts: tuple[str, ...] = (socket.gethostname(),)
        self.node_of_rank: tuple[int, ...] = (0,)
        self.local_rank, self.local_size = 0, 1
        self.library = "none"
        self.progress = Progress()
        if mpi is not None:
            self._join(mpi, comm)

    @classmethod
    def start(cls, launcher: Launcher, threads: int = 1, comm: Intracomm | None = None) -> World:
        """Join the launcher's ranks; a plain process without a launcher is a world of one rank and starts no MPI.

        Args:
            launcher: What `detect_launcher` found.
            threads: Compute threads per rank, to know whether ranks share cores.
            comm: Whose ranks to join; None: all.

        Raises:
            EnvironmentMismatch: No MPI library, or one that does not belong to the launcher.
            UsageError: `comm` is no communicator of this process.
        """
        if comm is None:
            return cls() if launcher.name == "none" else cls(start_mpi(launcher, threads))
        mpi = start_mpi(launcher, threads)
        if not isinstance(comm, mpi.Intracomm) or comm == mpi.COMM_NULL:
            raise UsageError(f"comm: expected an mpi4py communicator such as MPI.COMM_WORLD, found {comm!r}")
        return cls(mpi, comm)

    def _join(self, mpi: ModuleType, comm: Intracomm | None) -> None:
        self.comm = comm.Dup() if comm is not None else world_communicator(mpi)
        self.rank, self.size = self.comm.rank, self.comm.size
        self.library = short_version(mpi.Get_library_version())
        self.hosts = tuple(self.gather_texts(self.host_name()))
        local = self.ranks_of_node()
        self.local_rank, self.local_size = local.rank, local.size
        first = np.array([self.rank], np.int64)
        local.Bcast([first, mpi.INT64_T], root=0)
        local.Free()
        firsts = np.empty(self.size, np.int64)
        self.comm.Allgather([first, mpi.INT64_T], [firsts, mpi.INT64_T])
        order = {int(rank): node for node, rank in enumerate(np.unique(firsts))}
        self.node_of_rank = tuple(order[int(rank)] for rank in firsts)
        forget_shared_names()

    def host_name(self) -> str:
        """What this rank's host is called."""
        return socket.gethostname()

    def ranks_of_node(self) -> Intracomm:
        """A communicator of the ranks that share this one's memory (collective)."""
        assert self.comm is not None
        assert self.mpi is not None
        return cast("Intracomm", self.comm.Split_type(self.mpi.COMM_TYPE_SHARED, key=self.rank))

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, which decides the steps, prints and talks to the user."""
        return self.rank == 0

    @property
    def hostname(self) -> str:
        """This rank's host."""
        return self.hosts[self.rank]

    @property
    def node(self) -> int:
        """Index of this rank's node."""
        return self.node_of_rank[self.rank]

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return max(self.node_of_rank) + 1

    def gather_texts(self, text: str) -> list[str]:
        """Every rank's text, by rank, on every rank (collective)."""
        if self.comm is None or self.mpi is None:
            return [text]
        data = np.frombuffer(text.encode(errors="replace"), np.uint8)
        lengths = np.empty(self.size, np.int64)
        with self.progress.exchanging():
            self.comm.Allgather([np.array([data.size], np.int64), self.mpi.INT64_T], [lengths, self.mpi.INT64_T])
        ends = np.cumsum(lengths)
        everything = np.empty(int(ends[-1]), np.uint8)
        counts, starts = lengths.tolist(), (ends - lengths).tolist()
        with self.progress.exchanging():
            self.comm.Allgatherv([data, self.mpi.UINT8_T], [everything, counts, starts, self.mpi.UINT8_T])
        whole = everything.tobytes()
        return [whole[start : start + n].decode(errors="replace") for start, n in zip(starts, counts, strict=True)]

    def gather_equal_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, by rank, on every rank; all of one length (collective)."""
        if self.comm is None or self.mpi is None:
            return [data]
        everything = np.empty((self.size, len(data)), np.uint8)
        own = np.frombuffer(data, np.uint8)
        with self.progress.exchanging():
            self.comm.Allgather([own, self.mpi.UINT8_T], [everything, self.mpi.UINT8_T])
        return [row.tobytes() for row in everything]

    def agree(self, error: DistMoeError | None, phase: str) -> None:
        """Tell all ranks whether any rank failed (collective; a barrier when none did).

        Args:
            error: This rank's planned error, or None.
            phase: What was being done, e.g. "opening the store", for the errors that only some ranks met.

        Raises:
            AgreedError: On every rank, when any rank brought an error.
        """
        if self.comm is None or self.mpi is None:
            if error is not None:
                raise AgreedError(_lines_of(error), error.exit_code) from error
            return
        code = np.array([0 if error is None else error.exit_code], np.int64)
        with self.progress.exchanging():
            self.comm.Allreduce(self.mpi.IN_PLACE, [code, self.mpi.INT64_T], self.mpi.MAX)
        if code[0] == 0:
            return
        texts = self.gather_texts("" if error is None else "\n".join(_lines_of(error)))
        raise AgreedError(merge_lines(texts, self.hosts, phase), int(code[0])) from error

    @contextmanager
    def together(self, phase: str) -> Iterator[None]:
        """Run a block on every rank that may meet a planned error, and `agree` on it at the end.

        Raises:
            AgreedError: On every rank, when any rank met an error.
        """
        error = None
        try:
            yield
        except AgreedError:
            raise
        except DistMoeError as own:
            error = own
        self.agree(error, phase)

    def barrier(self) -> None:
        """Wait for all ranks (collective; burns a core while it waits)."""
        if self.comm is not None:
            with self.progress.exchanging():
                self.comm.Barrier()

    def sleep_until_all(self) -> None:
        """Wait for all ranks without burning a core, for waits of seconds or more (collective)."""
        if self.comm is not None:
            with self.progress.exchanging():
                request = self.comm.Ibarrier()
                while not request.Test():
                    time.sleep(_NAP_S)

    def abort(self, code: int) -> NoReturn:
        """End all ranks now with this exit code."""
        if self.mpi is None:
            raise SystemExit(code)
        abort(self.mpi, code)

    def finalize(self) -> None:
        """End MPI in good order (collective); the world is not used afterwards."""
        if self.comm is not None and self.mpi is not None and not self.mpi.Is_finalized():
            self.comm.Free()
            self.mpi.Finalize()
        self.comm = None


def merge_lines(texts: list[str], hosts: tuple[str, ...], phase: str) -> tuple[str, ...]:
    """Every distinct error line once, by lowest rank; with ranks and hosts unless all ranks say the same.

    Args:
        texts: One text per rank; "" where a rank has no error.
        hosts: Host name of every rank.
        phase: What was being done.
    """
    if len(set(texts)) == 1:
        return tuple(texts[0].splitlines())
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        if text:
            ranks_of.setdefault(text, []).append(rank)
    merged: list[str] = []
    for text, ranks in ranks_of.items():
        names = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
        numbers = ", ".join(map(str, ranks))
        where = f"rank{'s' if len(ranks) > 1 else ''} {numbers} on {names}, {phase}: "
        merged += [where + line for line in text.splitlines()]
    return tuple(merged)


def _lines_of(error: DistMoeError) -> tuple[str, ...]:
    """The error's lines; an error without a text still says its name."""
    return tuple(str(error).splitlines()) or (type(error).__name__,)
