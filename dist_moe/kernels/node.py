"""The ranks of one host exchange through shared memory: exact sums, lowest faults, broadcasts, gathers."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe.errors import EnvironmentMismatch
from dist_moe.kernels.arrays import I32, I64, Pointer
from dist_moe.kernels.library import ffi, lib

NODE_RANK_BYTES = 2 * int(lib.DM_NODE_SLOT_BYTES)  # of shared memory, for each rank


class NodeMemory:
    """One host's shared memory, from one rank's side. Every method is collective over the host's ranks.

    Nothing is left behind by a killed job: the memory has no name in any directory.

    Attributes:
        path: On the first rank, where the others open the memory; else "".
    """

    def __init__(self, name: str, rank: int, ranks: int, spins: int = 0, path: str = "") -> None:
        """Create the memory on the host's first rank, open it on the others (after the first).

        Args:
            name: Of the memory, unique to the job.
            rank: This rank's place among the host's.
            ranks: How many there are.
            spins: On the first rank, for all: pauses before a waiting rank sleeps; 0 where ranks share cores.
            path: On the others, the first rank's `path`.

        Raises:
            EnvironmentMismatch: The memory cannot be made, opened or mapped.
        """
        self._rank = rank
        self._ranks = ranks
        self.path = ""
        if rank == 0:
            self._node: Pointer = lib.dm_node_create(name.encode(), ranks, spins)
        else:
            self._node = lib.dm_node_open(path.encode(), name.encode(), rank, ranks)
        if self._node == ffi.NULL:
            made = f"{path} cannot be opened" if rank else "cannot be made"
            raise EnvironmentMismatch(f"{ranks} ranks' shared memory {made}: {os.strerror(ffi.errno)}")
        if rank == 0:
            self.path = f"/proc/{os.getpid()}/fd/{lib.dm_node_file(self._node)}"

    def close_file(self) -> None:
        """Let nobody else in; to be called on the first rank once all ranks have opened the memory."""
        lib.dm_node_close_file(self._node)

    def close(self) -> None:
        """Unmap the memory; every later call is refused."""
        if self._node is not None:
            lib.dm_node_close(self._node)
            self._node = None

    def sum(self, values: npt.NDArray[np.int64]) -> None:
        """Add the ranks' int64 values in place."""
        lib.dm_node_sum(self._node, I64.whole(values), values.size)

    def minimum(self, values: npt.NDArray[np.int32]) -> None:
        """Take the lowest of the ranks' int32 values in place."""
        lib.dm_node_min(self._node, I32.whole(values), values.size)

    def broadcast(self, values: npt.NDArray[Any]) -> None:
        """Give the first rank's array, of any type and C-contiguous, to all ranks in place."""
        lib.dm_node_broadcast(self._node, ffi.from_buffer(values, require_writable=True), values.nbytes)

    def gather(self, own: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        """Stack the ranks' equal arrays [...] on the first rank as [ranks, ...]; None on the others."""
        out = np.empty((self._ranks, *own.shape), own.dtype) if self._rank == 0 else None
        to = ffi.NULL if out is None else ffi.from_buffer(out, require_writable=True)
        lib.dm_node_gather(self._node, to, ffi.from_buffer(own), own.nbytes)
        return out
