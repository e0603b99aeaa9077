"""Memory for the blocks of a KV cache: slabs of huge pages, cut into blocks of one size."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dist_moe.huge_pages import huge_page_memory
from dist_moe.kernels import ALIGNMENT, address_of

# Pages take room when a block is first written to, so a large slab costs nothing.
_SLAB_BYTES = 32 << 20
_MOST_BLOCKS = 1024  # of a slab


@dataclass(eq=False)
class _Slab:
    """Memory of several blocks: the addresses of the free ones."""

    memory: npt.NDArray[np.uint8]
    free: list[int] = field(default_factory=list)


@dataclass
class _Block:
    """A block in use."""

    slab: _Slab
    holders: int = 1


class BlockMemory:
    """Blocks of one size, each held by as many sequences as share it.

    A slab without a block in use is given back, but for one, which a growing cache would ask for again.
    """

    def __init__(self, block_bytes: int) -> None:
        self._bytes = block_bytes
        # A rank without heads has empty blocks, of which kernels take an address, too.
        self._stride = max(1, -(-block_bytes // ALIGNMENT)) * ALIGNMENT
        self._per_slab = min(_MOST_BLOCKS, max(1, _SLAB_BYTES // self._stride))
        self._slabs = 0
        self._open: dict[_Slab, None] = {}  # slabs with free blocks, one that is wholly free at the end
        self._blocks: dict[int, _Block] = {}  # in use, by address

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks in use, shared ones counted once."""
        return len(self._blocks) * self._bytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of all slabs: more than they can take room for."""
        return self._slabs * self._per_slab * self._stride

    def take(self) -> int:
        """The address of a block whose content is anything; its first holder is the caller.

        Raises:
            MemoryError: The system gives no more address space.
        """
        slab = next(iter(self._open), None) or self._add_slab()
        address = slab.free.pop()
        if not slab.free:
            del self._open[slab]
        self._blocks[address] = _Block(slab)
        return address

    def hold(self, address: int) -> None:
        """One more holder."""
        self._blocks[address].holders += 1

    def release(self, address: int) -> None:
        """One holder less; without any the block may be taken again."""
        block = self._blocks[address]
        block.holders -= 1
        if block.holders:
            return
        del self._blocks[address]
        self._put_back(block.slab, address)

    def block(self, address: int) -> npt.NDArray[np.uint8]:
        """The bytes of a block in use, uint8 [block_bytes]; valid while it has a holder."""
        memory = self._blocks[address].slab.memory
        first = address - address_of(memory)
        return memory[first : first + self._bytes]

    def _put_back(self, slab: _Slab, address: int) -> None:
        slab.free.append(address)
        if not self._is_idle(slab):
            # In front: slabs that are in use anyway serve first.
            if slab not in self._open:
                self._open = {slab: None, **self._open}
            return
        self._open.pop(slab, None)
        last = next(reversed(self._open), None)
        if last is not None and self._is_idle(last):
            self._slabs -= 1
        else:
            self._open[slab] = None

    def _is_idle(self, slab: _Slab) -> bool:
        return len(slab.free) == self._per_slab

    def _add_slab(self) -> _Slab:
        memory = huge_page_memory(self._per_slab * self._stride)
        first = address_of(memory)
        slab = _Slab(memory, [first + i * self._stride for i in reversed(range(self._per_slab))])
        self._open[slab] = None
        self._slabs += 1
        return slab
