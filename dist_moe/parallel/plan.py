"""Which rank computes what: pure functions of the model's sizes, the nodes, and what each node holds, without MPI.

Nothing here changes a bit of the result (sums over units are exact integers); it only decides who works.
Shape suffixes: N nodes, U units of one kind, C chunks of one layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.model_config import ModelConfig
from dist_moe.parallel.chunk_owners import Chunks, sliced_owners, whole_owners
from dist_moe.parallel.holdings import Held, Holdings, chunk_counts, everything_held
from dist_moe.parallel.owners import balanced_owners
from dist_moe.split import VOCABULARY_BLOCK, contiguous

EXPERT_LAYOUTS = ("whole", "sliced", "shared")

# Where each step's chunks are dealt out: reading one's weights costs as much as multiplying them with this many tokens.
CHUNK_READ_COST_TOKENS = 8


@dataclass(frozen=True, eq=False)
class Plan:
    """One rank's share: ascending units of each kind (of any there may be none), and a layout of experts.

    Attributes:
        rank, ranks: Whose share, and how many ranks there are.
        node, nodes: The node of this rank, and how many there are.
        local_rank, local_ranks: Its place among that node's ranks, and how many those are.
        heads: Query heads.
        kv_heads: The KV heads that they read.
        vocabulary_blocks: Blocks of 128 rows of lm_head.
        vocabulary_rows: Rows of these blocks; the model's last block may have fewer than 128.
        layout: `whole`, `sliced` or `shared`.
    """

    rank: int
    ranks: int
    node: int
    nodes: int
    local_rank: int
    local_ranks: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    vocabulary_blocks: tuple[int, ...]
    vocabulary_rows: int
    layout: str
    _owned: tuple[Chunks | None, ...]
    _readable: tuple[Chunks, ...]

    def owned_chunks(self, layer: int) -> Chunks | None:
        """The chunks of a layer that are always this rank's, ascending; None if each step deals them out anew."""
        return self._owned[layer]

    def readable_chunks(self, layer: int) -> Chunks:
        """The chunks of a layer that some step may give to this rank, ascending."""
        return self._readable[layer]


@dataclass(frozen=True, eq=False)
class JobPlan:
    """All ranks' shares, and what they were made from.

    Attributes:
        plans: By rank.
        node_of_rank: The node of each rank.
        holdings: What each node has in its files.
        speeds: How much of a step's work on experts each node does in the same time, where several could do it.
    """

    plans: tuple[Plan, ...]
    node_of_rank: tuple[int, ...]
    holdings: Holdings
    speeds: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.plans)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.holdings.nodes

    @property
    def layout(self) -> str:
        """How experts are divided: `whole`, `sliced` or `shared`."""
        return self.plans[0].layout

    def holds(self, layer: int) -> Held:
        """Which node holds which chunk of a layer, bool [N, C]; read-only."""
        return self.holdings.chunks_NC[layer]

    def of_node(self, node: int) -> list[Plan]:
        """The shares of a node's ranks, ascending."""
        return [plan for plan in self.plans if plan.node == node]

    def kv_senders(self) -> list[tuple[int, ...]]:
        """By rank, the KV heads that it alone sends where each is wanted once: those that no lower rank has."""
        seen: set[int] = set()
        sent = []
        for plan in self.plans:
            sent.append(tuple(head for head in plan.kv_heads if head not in seen))
            seen.update(plan.kv_heads)
        return sent

    def vocabulary_columns(self) -> npt.NDArray[np.int64] | None:
        """Where each id stands in the ranks' rows of lm_head side by side, int64 [V]; None where they are in order."""
        blocks = [block for plan in self.plans for block in plan.vocabulary_blocks]
        if blocks == sorted(blocks):
            return None
        vocabulary = sum(plan.vocabulary_rows for plan in self.plans)
        ids = [np.arange(block * VOCABULARY_BLOCK, min((block + 1) * VOCABULARY_BLOCK, vocabulary)) for block in blocks]
        return in_order(np.concatenate(ids))


def in_order(numbers: Iterable[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The places of distinct numbers, ascending by number: `numbers[in_order(numbers)]` is sorted."""
    return np.argsort(np.fromiter(numbers, np.int64), kind="stable")


def plan_job(
    config: ModelConfig,
    group_size: int,
    layout: str,
    *,
    node_of_rank: Sequence[int],
    holdings: Holdings | None = None,
    speeds: Sequence[int] | None = None,
) -> JobPlan:
    """Give every unit to one rank whose node holds it: units to nodes first, then to the node's ranks, evenly.

    Args:
        config: The model.
        group_size: Weights per scale, which decides the chunks.
        layout: `whole`, `sliced` or `shared`: each step deals a node's part of the work out to its ranks.
        node_of_rank: The node of each rank; nodes count from 0, and each has a rank.
        holdings: What each node has; each unit is on some node. None: each has everything.
        speeds: Of the nodes; None: as many as they have ranks.
    """
    nodes = max(node_of_rank) + 1
    held = holdings or everything_held(config, group_size, nodes)
    ranks_of_node = [[rank for rank, where in enumerate(node_of_rank) if where == node] for node in range(nodes)]
    heads = _deal(usable_heads(held, config.heads_per_kv_head), ranks_of_node)
    blocks = _deal(held.vocabulary_NB, ranks_of_node)
    owned = _owned_chunks(config, group_size, layout, held, ranks_of_node)
    held_chunks = [_held_chunks(held, node) for node in range(nodes)]
    plans = []
    for rank, node in enumerate(node_of_rank):
        own = tuple(of_rank[rank] for of_rank in owned)
        plans.append(
            Plan(
                rank=rank,
                ranks=len(node_of_rank),
                node=node,
                nodes=nodes,
                local_rank=ranks_of_node[node].index(rank),
                local_ranks=len(ranks_of_node[node]),
                heads=heads[rank],
                kv_heads=tuple(sorted({head // config.heads_per_kv_head for head in heads[rank]})),
                vocabulary_blocks=blocks[rank],
                vocabulary_rows=sum(block_rows(config.vocabulary, block) for block in blocks[rank]),
                layout=layout,
                _owned=own,
                _readable=tuple(
                    held_chunks[node][layer] if chunks is None else chunks for layer, chunks in enumerate(own)
                ),
            )
        )
    node_speeds = tuple(speeds or (len(ranks) for ranks in ranks_of_node))
    return JobPlan(tuple(plans), tuple(node_of_rank), held, node_speeds)


def block_rows(vocabulary: int, block: int) -> int:
    """Rows of one block of lm_head."""
    return max(0, min(VOCABULARY_BLOCK, vocabulary - block * VOCABULARY_BLOCK))


def usable_heads(holdings: Holdings, heads_per_kv_head: int) -> Held:
    """The query heads that a node can compute: it holds them and their KV heads; bool [N, H]."""
    return holdings.heads_NH & np.repeat(holdings.kv_heads_NG, heads_per_kv_head, axis=1)


def _deal(held_NU: Held, ranks_of_node: Sequence[Sequence[int]]) -> dict[int, tuple[int, ...]]:
    """Each rank's units: every node's are cut into contiguous runs over its ranks."""
    owner_U = balanced_owners(held_NU, [len(ranks) for ranks in ranks_of_node])
    dealt = {}
    for node, ranks in enumerate(ranks_of_node):
        units = np.flatnonzero(owner_U == node).tolist()
        for place, rank in enumerate(ranks):
            part = contiguous(len(units), len(ranks), place)
            dealt[rank] = tuple(units[part.start : part.stop])
    return dealt


def _held_chunks(held: Holdings, node: int) -> list[Chunks]:
    """By layer, the chunks of a node, ascending; layers that are held alike share them."""
    found: dict[int, Chunks] = {}
    for held_NC in held.chunks_NC:
        if id(held_NC) not in found:
            found[id(held_NC)] = np.flatnonzero(held_NC[node])
    return [found[id(held_NC)] for held_NC in held.chunks_NC]


def _owned_chunks(
    config: ModelConfig, group_size: int, layout: str, held: Holdings, ranks_of_node: Sequence[Sequence[int]]
) -> list[list[Chunks | None]]:
    """By layer, each rank's chunks; layers that are held alike share them."""
    owners = {"whole": whole_owners, "sliced": sliced_owners}.get(layout)
    found: dict[tuple[int, bytes], list[Chunks | None]] = {}
    layers = []
    for layer, held_NC in enumerate(held.chunks_NC):
        experts, _ = chunk_counts(config, group_size, layer)
        key = (experts, held_NC.tobytes())
        if key not in found:
            nobody: list[Chunks | None] = [None for ranks in ranks_of_node for _ in ranks]
            found[key] = nobody if owners is None else [*owners(held_NC, experts, ranks_of_node)]
        layers.append(found[key])
    return layers
