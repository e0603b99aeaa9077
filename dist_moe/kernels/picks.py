"""Who shares the work on experts and who holds which chunks, as the kernels take it, and what they decided.

Legend: N nodes, R runs of chunks, H entries of their holders, A parts of a step. See csrc/pick.h.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dist_moe.kernels.arrays import I32, I64, I32Array, Pointer
from dist_moe.kernels.library import ffi, lib

LARGEST_SPEED = 1 << 20
_RUN_WORDS = 5
_PART_WORDS = 6

assert ffi.sizeof("dm_chunk_run") == 4 * _RUN_WORDS, "ChunkHolders lays dm_chunk_run out as int32 words"
assert ffi.sizeof("dm_part") == 4 * _PART_WORDS, "Picks lays dm_part out as int32 words"


@dataclass(frozen=True)
class Workers:
    """Who shares the work on experts (`dm_workers`): nodes, and the ranks of this rank's node."""

    node: int
    rank: int  # inside the node
    ranks: int
    read_cost: int  # of a chunk, in tokens
    speeds: tuple[int, ...] = (1,)  # of each node, 1 to LARGEST_SPEED

    def __post_init__(self) -> None:
        """Refuse numbers that C would trust."""
        if not all(0 < speed <= LARGEST_SPEED for speed in self.speeds) or self.read_cost < 1:
            raise TypeError(f"speeds {self.speeds}, read cost {self.read_cost}")
        if not 0 <= self.node < len(self.speeds) or not 0 <= self.rank < self.ranks:
            raise TypeError(f"node {self.node} of {len(self.speeds)}, rank {self.rank} of {self.ranks}")

    def struct(self) -> tuple[dict[str, object], Pointer]:
        """The fields of the C structure, and the memory that they point to, which the caller keeps."""
        speeds = ffi.new("int64_t[]", self.speeds)
        fields = {
            "node": self.node,
            "nodes": len(self.speeds),
            "rank": self.rank,
            "ranks": self.ranks,
            "read_cost": self.read_cost,
            "speed_N": speeds,
        }
        return fields, speeds


class ChunkHolders:
    """Which nodes hold the chunks of a layer (`dm_holders`)."""

    def __init__(self, runs_R5: I32Array, node_H: I32Array, nodes: int) -> None:
        """Take runs of chunks that the same nodes hold.

        Args:
            runs_R5: int32 [R, 5]: expert, first chunk of it, chunks, first entry of node_H, entries.
            node_H: int32 [H], the nodes of each run, ascending.
            nodes: N.
        """
        self.runs, self.entries = len(runs_R5), len(node_H)
        if len(node_H) and not 0 <= int(node_H.min()) <= int(node_H.max()) < nodes:
            raise TypeError(f"holders {int(node_H.min())} to {int(node_H.max())} of {nodes} nodes")
        if self.runs and int((runs_R5[:, 3] + runs_R5[:, 4]).max()) > self.entries:
            raise TypeError(f"runs of more than {self.entries} holder entries")
        self.chunk_count = int(runs_R5[:, 2].sum())
        self.nodes = nodes
        self._arrays = (runs_R5, node_H)
        self._kept = (I32.read(runs_R5, self.runs, _RUN_WORDS), I32.read(node_H, self.entries))
        runs = ffi.cast("dm_chunk_run *", self._kept[0])
        self.struct: Pointer = ffi.new("dm_holders *", (runs, self._kept[1], self.runs, self.entries))


class Picks:
    """Which node computes what of a step's experts (`dm_picks`), reused from layer to layer."""

    def __init__(self, nodes: int, experts: int, holders: Iterable[ChunkHolders | None] = ()) -> None:
        """Make room for layers of up to `experts` experts, held as `holders` say (None on one node)."""
        known = [held for held in holders if held is not None]
        self.nodes, self.experts = nodes, experts
        self.runs = max((held.runs for held in known), default=0)
        self.entries = max((held.entries for held in known), default=0)
        self.parts_A6: I32Array = np.zeros((max(experts, self.entries), _PART_WORDS), np.int32)
        scratch_words = lib.dm_pick_scratch_words(nodes, self.runs, self.entries)
        self._scratch = np.zeros(scratch_words, np.int64)
        parts = ffi.cast("dm_part *", I32.write(self.parts_A6, len(self.parts_A6), _PART_WORDS))
        self._kept = (parts, I64.write(self._scratch, scratch_words))
        self.struct: Pointer = ffi.new("dm_picks *", (*self._kept, 0))

    @property
    def parts(self) -> I32Array:
        """What was decided last; valid until the next layer.

        int32 [A, 6]: expert, node, first chunk of it, chunks, first entry of the token list, entries.
        """
        return self.parts_A6[: self.struct.part_count]

    def fits(self, experts: int, holders: ChunkHolders | None) -> bool:
        """Whether a layer's assignment has room."""
        if holders is None:
            return self.nodes == 1 and experts <= self.experts
        return holders.nodes == self.nodes and holders.runs <= self.runs and holders.entries <= self.entries
