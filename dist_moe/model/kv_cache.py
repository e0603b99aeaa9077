"""Keys and values of this rank's KV heads, in blocks of 64 positions that grow with each sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import BLOCK_POSITIONS, KvFormat, KvView, address_of, aligned_empty, kv_block_bytes
from dist_moe.model.step import Fork, Step


@dataclass
class _Sequence:
    """The blocks of one sequence: their buffers, which keep them alive, and their addresses."""

    buffers: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)


class KvCache:
    """The caches of all sequences on one rank.

    Position block b of a sequence is one buffer [layers][local KV heads][K, then V of 64 positions], so that a
    sequence costs what it holds, not what it might hold. Sequences that were forked share whole blocks, which nobody
    writes to any more.

    Attributes:
        layer_bytes: A layer's part of a block.
    """

    def __init__(self, kv_format: KvFormat, layers: int, kv_heads: int, head_dim: int) -> None:
        self._format = kv_format
        self.layer_bytes = kv_heads * kv_block_bytes(kv_format, head_dim)
        self._block_bytes = layers * self.layer_bytes
        self._sequences: dict[int, _Sequence] = {}

    @property
    def allocated_bytes(self) -> int:
        """Bytes that all sequences hold now, shared blocks counted once."""
        blocks = {address for sequence in self._sequences.values() for address in sequence.addresses}
        return len(blocks) * self._block_bytes

    def view(self, step: Step, layer: int = 0) -> KvView:
        """Where the step's tokens read and write in a layer; forks, releases and allocates blocks first."""
        for fork in step.forks:
            self._fork(fork)
        for sequence in step.released:
            self._sequences.pop(sequence, None)
        blocks: list[int] = []
        table_T = np.empty(step.tokens, dtype=np.int64)
        position_T = np.empty(step.tokens, dtype=np.int64)
        at = 0
        for part in step.slices:
            stop = part.position + len(part.ids)
            rows = slice(at, at + len(part.ids))
            table_T[rows] = len(blocks)
            position_T[rows] = np.arange(part.position, stop)
            blocks += self._grow(part.sequence, stop).addresses
            at = rows.stop
        return KvView(np.array(blocks, dtype=np.uint64), table_T, position_T, layer * self.layer_bytes, self._format)

    def _grow(self, name: int, positions: int) -> _Sequence:
        sequence = self._sequences.setdefault(name, _Sequence())
        while len(sequence.buffers) * BLOCK_POSITIONS < positions:
            self._add_block(sequence)
        return sequence

    def _fork(self, fork: Fork) -> None:
        source = self._sequences[fork.source]
        whole, rest = divmod(fork.positions, BLOCK_POSITIONS)
        sequence = _Sequence(source.buffers[:whole], source.addresses[:whole])
        if rest:  # it will be written to: a copy, stale positions included, which are not read before they are written
            self._add_block(sequence)[:] = source.buffers[whole]
        self._sequences[fork.sequence] = sequence

    def _add_block(self, sequence: _Sequence) -> npt.NDArray[np.uint8]:
        buffer: npt.NDArray[np.uint8] = aligned_empty((self._block_bytes,), np.uint8)
        sequence.buffers.append(buffer)
        sequence.addresses.append(address_of(buffer))
        return buffer
