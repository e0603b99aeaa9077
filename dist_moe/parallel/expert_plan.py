"""The expert half of a plan: which nodes may compute which chunks. Pure.

Each step gives the work on every distinct expert to the nodes that hold it (csrc/pick.c), then to the ranks of a node.
Shape suffixes: N nodes, E experts, C chunks of one layer, R runs of chunks, H entries of their holders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.parallel.holdings import Held
from dist_moe.parallel.plan import JobPlan


@dataclass(frozen=True, eq=False)
class ChunkRuns:
    """The chunks of a layer as runs, each of one expert and of the same holders.

    Attributes:
        runs_R5: int32 [R, 5]: expert, first chunk of it, chunks, first entry of node_H, entries.
        node_H: int32 [H], the nodes of each run, ascending.
    """

    runs_R5: npt.NDArray[np.int32]
    node_H: npt.NDArray[np.int32]


def chunk_runs(held_NC: Held, experts: int) -> ChunkRuns:
    """Put chunks that the same nodes hold together.

    Args:
        held_NC: Which node may compute which chunk (expert * chunks per expert + chunk).
        experts: E.
    """
    chunks = held_NC.shape[1]
    per_expert = chunks // experts
    starts = np.ones(chunks, np.bool_)
    starts[1:] = (held_NC[:, 1:] != held_NC[:, :-1]).any(axis=0)
    starts[::per_expert] = True
    first_R = np.flatnonzero(starts)
    count_R = np.diff(np.append(first_R, chunks))
    holders_RN = held_NC[:, first_R].T
    entries_R = holders_RN.sum(axis=1)
    columns = (first_R // per_expert, first_R % per_expert, count_R, np.cumsum(entries_R) - entries_R, entries_R)
    return ChunkRuns(
        runs_R5=np.ascontiguousarray(np.stack(columns, axis=1), np.int32),
        node_H=np.nonzero(holders_RN)[1].astype(np.int32),
    )


def runs_of_layer(job: JobPlan, layer: int, experts: int) -> ChunkRuns | None:
    """The chunks of a layer by the nodes that may compute them; None on one node, which computes all.

    With shared experts that is every node that holds them; else each chunk has one rank, and so one node.
    """
    if job.nodes == 1:
        return None
    if job.layout == "shared":
        return chunk_runs(job.holds(layer), experts)
    owned = [plan.owned_chunks(layer) for plan in job.plans]
    return chunk_runs(single_holders(owned, job.node_of_rank, job.holds(layer).shape[1]), experts)


def single_holders(owned: Sequence[npt.NDArray[np.int64] | None], node_of_rank: Sequence[int], chunks: int) -> Held:
    """The node of the rank that always computes a chunk as its only holder, bool [N, C].

    Args:
        owned: Each rank's chunks.
        node_of_rank: The node of each rank.
        chunks: C.
    """
    held_NC = np.zeros((max(node_of_rank) + 1, chunks), np.bool_)
    for own, node in zip(owned, node_of_rank, strict=True):
        held_NC[node, own] = True
    return held_NC
