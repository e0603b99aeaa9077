"""Expert chunks to ranks, by the files that each node has: units to nodes first, then to the node's ranks. Pure.

Shape suffixes: N nodes, E experts, C chunks of the layer (expert * chunks per expert + chunk).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dist_moe.parallel.owners import Counts, Held, balanced_owners
from dist_moe.split import contiguous

Chunks = npt.NDArray[np.int64]


def whole_owners(held_NC: Held, experts: int, ranks_of_node: Sequence[Sequence[int]]) -> list[Chunks]:
    """Each rank's chunks of one layer: whole experts where a node holds all of one, else single chunks.

    A dense MLP is one expert, which would land on one rank alone: its chunks are dealt out instead.

    Args:
        held_NC: Which node holds which chunk; some node holds each.
        experts: Of the layer.
        ranks_of_node: Ranks of each node, ascending.

    Returns:
        By rank, the linear chunk indices, ascending.
    """
    nodes, chunks = held_NC.shape[0], held_NC.shape[1] // experts
    ranks_N = [len(ranks) for ranks in ranks_of_node]
    owner_E: Counts = np.full(experts, -1, np.int64)
    if experts > 1:
        held_NE = np.logical_and.reduce(held_NC.reshape(nodes, experts, chunks), axis=2)
        owner_E = balanced_owners(held_NE, ranks_N)
    loose_C = np.flatnonzero(np.repeat(owner_E < 0, chunks))
    load_N = [int((owner_E == node).sum()) * chunks for node in range(nodes)]
    owner_loose = balanced_owners(held_NC[:, loose_C], ranks_N, load_N)
    owned: dict[int, Chunks] = {}
    for node, ranks in enumerate(ranks_of_node):
        own_experts, own_loose = np.flatnonzero(owner_E == node), loose_C[owner_loose == node]
        for place, rank in enumerate(ranks):
            part = own_experts[_slice(len(own_experts), len(ranks), place)]
            whole = (part[:, np.newaxis] * chunks + np.arange(chunks)).ravel()
            owned[rank] = np.sort(np.concatenate([whole, own_loose[_slice(len(own_loose), len(ranks), place)]]))
    return [owned[rank] for rank in range(len(owned))]


def sliced_owners(held_NC: Held, experts: int, ranks_of_node: Sequence[Sequence[int]]) -> list[Chunks]:
    """Each rank's chunks when the chunks of expert e that the same ranks can read go to them in turn, from e on.

    Where every node holds all chunks, that is chunk c of expert e on rank (e + c) mod ranks. Arguments and result as
    of `whole_owners`.
    """
    chunks = held_NC.shape[1] // experts
    owned: list[list[int]] = [[] for ranks in ranks_of_node for _ in ranks]
    readers: dict[bytes, list[int]] = {}
    for column in np.unique(held_NC.T, axis=0):
        readers[column.tobytes()] = sorted(
            rank for node in np.flatnonzero(column).tolist() for rank in ranks_of_node[node]
        )
    for expert in range(experts):
        turns = dict.fromkeys(readers, expert)
        for chunk in range(expert * chunks, (expert + 1) * chunks):
            column = held_NC[:, chunk].tobytes()
            ranks = readers[column]
            owned[ranks[turns[column] % len(ranks)]].append(chunk)
            turns[column] += 1
    return [np.array(own, np.int64) for own in owned]


def _slice(total: int, parts: int, index: int) -> slice:
    part = contiguous(total, parts, index)
    return slice(part.start, part.stop)
