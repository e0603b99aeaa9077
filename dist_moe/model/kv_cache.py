"""Keys and values of this rank's KV heads, in blocks of 64 positions that grow with each sequence."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import BLOCK_POSITIONS, KvFormat, KvView, kv_block_bytes
from dist_moe.model.kv_blocks import BlockMemory
from dist_moe.model.kv_layout import read_rows, row_bytes, write_rows
from dist_moe.model.step import Fork, Step


class KvCache:
    """The caches of all sequences on one rank.

    Position block b of a sequence is bytes [layers][local KV heads][K, then V of 64 positions], so that a
    sequence costs what it holds, not what it might hold. Sequences that were forked share whole blocks, which nobody
    writes to any more.

    Attributes:
        layer_bytes: A layer's part of a block.
    """

    def __init__(self, kv_format: KvFormat, layers: int, kv_heads: int, head_dim: int) -> None:
        self._format = kv_format
        self._kv_heads = kv_heads
        self._head_dim = head_dim
        self.layer_bytes = kv_heads * kv_block_bytes(kv_format, head_dim)
        self._head_bytes = kv_block_bytes(kv_format, head_dim)
        self._memory = BlockMemory(layers * self.layer_bytes)
        self._sequences: dict[int, list[int]] = {}  # addresses of blocks

    @property
    def row_bytes(self) -> int:
        """B: bytes of one position of one KV head in one layer."""
        return row_bytes(self._format, self._head_dim)

    @property
    def allocated_bytes(self) -> int:
        """Bytes that all sequences hold now, shared blocks counted once."""
        return self._memory.used_bytes

    @property
    def mapped_bytes(self) -> int:
        """Address space of all blocks, free ones included."""
        return self._memory.mapped_bytes

    def view(self, step: Step, layer: int = 0) -> KvView:
        """Where the step's tokens read and write in a layer; forks, releases and allocates blocks first."""
        for fork in step.forks:
            self._fork(fork)
        for sequence in step.released:
            self._release(sequence)
        blocks: list[int] = []
        table_T = np.empty(step.tokens, dtype=np.int64)
        position_T = np.empty(step.tokens, dtype=np.int64)
        at = 0
        for part in step.slices:
            stop = part.position + len(part.ids)
            rows = slice(at, at + len(part.ids))
            table_T[rows] = len(blocks)
            position_T[rows] = np.arange(part.position, stop)
            blocks += self._grow(part.sequence, stop)
            at = rows.stop
        return KvView(np.array(blocks, dtype=np.uint64), table_T, position_T, layer * self.layer_bytes, self._format)

    def read(self, name: int, layer: int, first: int, stop: int) -> npt.NDArray[np.uint8]:
        """K and V of some positions of a sequence.

        Args:
            name: The sequence.
            layer: Of which layer.
            first: The first position, a multiple of 64.
            stop: Behind the last position.

        Returns:
            uint8 [stop - first, local KV heads, B] (see kv_layout).
        """
        parts = [
            read_rows(self._layer(name, layer, block), self._format, self._head_dim)
            for block in range(first // BLOCK_POSITIONS, -(-stop // BLOCK_POSITIONS))
        ]
        return np.concatenate(parts)[: stop - first]

    def write(self, name: int, layer: int, first: int, rows: npt.NDArray[np.uint8]) -> None:
        """The inverse of `read`: uint8 [n, local KV heads, B]; what follows them in the last block becomes zeros."""
        self._grow(name, first + len(rows))
        for start in range(0, len(rows), BLOCK_POSITIONS):
            whole = np.zeros((BLOCK_POSITIONS, *rows.shape[1:]), np.uint8)
            whole[: len(rows) - start] = rows[start : start + BLOCK_POSITIONS]
            part = self._layer(name, layer, (first + start) // BLOCK_POSITIONS)
            write_rows(part, whole, self._format, self._head_dim)

    def _layer(self, name: int, layer: int, block: int) -> npt.NDArray[np.uint8]:
        """A layer's part of a block, uint8 [local KV heads, bytes of a KV head's block]."""
        whole = self._memory.block(self._sequences[name][block])
        return whole[layer * self.layer_bytes : (layer + 1) * self.layer_bytes].reshape(-1, self._head_bytes)

    def _grow(self, name: int, positions: int) -> list[int]:
        sequence = self._sequences.setdefault(name, [])
        while len(sequence) * BLOCK_POSITIONS < positions:
            sequence.append(self._memory.take())
        return sequence

    def _fork(self, fork: Fork) -> None:
        source = self._sequences[fork.source]
        whole, rest = divmod(fork.positions, BLOCK_POSITIONS)
        sequence = source[:whole]
        for address in sequence:
            self._memory.hold(address)
        if rest:  # it will be written to: a copy, stale positions included, which are not read before they are written
            sequence.append(self._memory.take())
            self._memory.block(sequence[-1])[:] = self._memory.block(source[whole])
        self._release(fork.sequence)
        self._sequences[fork.sequence] = sequence

    def _release(self, name: int) -> None:
        for address in self._sequences.pop(name, []):
            self._memory.release(address)
