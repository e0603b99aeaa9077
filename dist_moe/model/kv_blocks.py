"""Memory for the blocks of a KV cache: runs of huge pages, cut into blocks of one size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_moe.huge_pages import huge_page_memory
from dist_moe.kernels import ALIGNMENT, address_of

# Pages take room when a block is first written to, so a long run costs nothing.
_RUN_BYTES = 32 << 20


class BlockMemory:
    """Blocks of one size, each held by as many sequences as share it; a run whose blocks are all free is given back."""

    def __init__(self, block_bytes: int) -> None:
        self._bytes = block_bytes
        # A rank without heads has empty blocks, of which kernels take an address, too.
        self._stride = max(1, -(-block_bytes // ALIGNMENT)) * ALIGNMENT
        self._per_run = max(1, _RUN_BYTES // self._stride)
        self._runs: dict[int, npt.NDArray[np.uint8]] = {}  # by address
        self._free: dict[int, list[int]] = {}  # of each run: the addresses of its free blocks
        self._holders: dict[int, int] = {}  # of each block in use

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks in use, shared ones counted once."""
        return len(self._holders) * self._bytes

    def take(self) -> int:
        """The address of a block whose content is anything; its first holder is the caller.

        Raises:
            MemoryError: The system gives no more address space.
        """
        run = next((run for run, free in self._free.items() if free), None)
        if run is None:
            run = self._add_run()
        address = self._free[run].pop()
        self._holders[address] = 1
        return address

    def hold(self, address: int) -> None:
        """One more holder."""
        self._holders[address] += 1

    def release(self, address: int) -> None:
        """One holder less; without any the block may be taken again."""
        self._holders[address] -= 1
        if self._holders[address]:
            return
        del self._holders[address]
        run = self._run_of(address)
        self._free[run].append(address)
        if len(self._free[run]) == self._per_run:
            del self._runs[run], self._free[run]

    def block(self, address: int) -> npt.NDArray[np.uint8]:
        """The bytes of a block in use, uint8 [block_bytes]; valid while it has a holder."""
        run = self._run_of(address)
        return self._runs[run][address - run : address - run + self._bytes]

    def _add_run(self) -> int:
        memory = huge_page_memory(self._per_run * self._stride)
        run = address_of(memory)
        self._runs[run] = memory
        self._free[run] = [run + i * self._stride for i in reversed(range(self._per_run))]
        return run

    def _run_of(self, address: int) -> int:
        return next(run for run in self._runs if 0 <= address - run < self._per_run * self._stride)
