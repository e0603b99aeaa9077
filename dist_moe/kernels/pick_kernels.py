"""Which node, and which of its ranks, computes what of a step's experts (csrc/pick.h).

Legend: E experts, N nodes, S steps, A parts of a step. No context: these are integers alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_moe.kernels.arrays import I32, I64, I32Array, I64Array, Pointer, U64Array
from dist_moe.kernels.buffers import ChunkList
from dist_moe.kernels.layer_kernels import ExpertsLayer
from dist_moe.kernels.library import ffi, lib
from dist_moe.kernels.picks import ChunkHolders, Picks, Workers


class PickKernels:
    """The functions of pick.h."""

    @staticmethod
    def assign_nodes(
        picks: Picks, layer: ExpertsLayer, offset_E1: I32Array, workers: Workers, keep_tokens: bool = False
    ) -> I32Array:
        """Which node computes what of a step whose tokens are grouped as offset_E1 (int32 [E + 1]) says.

        Args:
            picks: Gets the decision.
            layer: Its chunks and their holders.
            offset_E1: As `group_by_expert` makes it.
            workers: The nodes.
            keep_tokens: A token's work on an expert stays on one node.

        Returns:
            int32 [A, 6]: expert, node, first chunk of it, chunks, first entry, entries; a view of `picks`.
        """
        who, _kept = _workers(picks, layer, workers)
        offset = I32.read(offset_E1, layer.experts + 1)
        lib.dm_assign_nodes(picks.struct, layer.struct, offset, who, keep_tokens)
        return picks.parts

    @staticmethod
    def pick_chunks(picks: Picks, layer: ExpertsLayer, offset_E1: I32Array, workers: Workers) -> U64Array:
        """The chunks that a rank computes in such a step.

        Returns:
            uint64 [n, 4]: each chunk's address, its format's, the first of its entries and how many (`ChunkList`).
        """
        who, _kept = _workers(picks, layer, workers)
        chunks = ChunkList(layer.chunk_count)
        offset = I32.read(offset_E1, layer.experts + 1)
        count = lib.dm_pick_chunks(chunks.struct, picks.struct, layer.struct, offset, who)
        return chunks.words[:count]


class WorkModel:
    """The node stage alone, for layers without weights: what a placement would make of routing."""

    def __init__(
        self, holders: ChunkHolders, experts: int, chunks_per_expert: int, speeds: Sequence[int], read_cost: int
    ) -> None:
        """Take who holds which chunks, and the nodes' speeds."""
        if holders.chunk_count > experts * chunks_per_expert or holders.nodes != len(speeds):
            raise TypeError(f"{holders.chunk_count} chunks on {holders.nodes} nodes, {experts} experts")
        self._experts, self._nodes = experts, len(speeds)
        self._picks = Picks(self._nodes, experts, [holders])
        fields, speed_N = Workers(0, 0, 1, read_cost, tuple(speeds)).struct()
        self._who = ffi.new("dm_workers *", fields)
        numbers = {"experts": experts, "chunks_per_expert": chunks_per_expert, "holders": holders.struct}
        self._layer = ffi.new("dm_experts_layer *", numbers)
        self._kept = (holders, speed_N)

    def node_work(self, offset_SE1: I32Array, keep_tokens: bool = False) -> I64Array:
        """The work of each node in steps that are grouped as offset_SE1 (int32 [S, E + 1]) says.

        Returns:
            int64 [S, N], in products of a chunk with a token, reading included.
        """
        steps = len(offset_SE1)
        work_SN = np.empty((steps, self._nodes), np.int64)
        offset = I32.read(offset_SE1, steps, self._experts + 1)
        out = I64.write(work_SN, steps, self._nodes)
        lib.dm_node_work(out, self._picks.struct, self._layer, offset, self._who, steps, keep_tokens)
        return work_SN


def _workers(picks: Picks, layer: ExpertsLayer, workers: Workers) -> tuple[Pointer, Pointer]:
    """The C structure and what it points to, after checking that the three belong together."""
    if len(workers.speeds) != picks.nodes or not picks.fits(layer.experts, layer.holders):
        raise TypeError(f"{len(workers.speeds)} nodes, picks for {picks.nodes}, and a layer that does not fit them")
    fields, speeds = workers.struct()
    return ffi.new("dm_workers *", fields), speeds
