"""What a run needs in memory on every host, compared with what is there, before any weight is read.

T tokens · D model dim · P head dim · E experts · K experts per token
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dist_moe.engine.start.agreement import StartRecord
from dist_moe.engine.start.record import show_bytes
from dist_moe.errors import UsageError
from dist_moe.kernels import BLOCK_POSITIONS, NODE_RANK_BYTES, KvFormat, SumsCodec, WireFormat, kv_block_bytes
from dist_moe.model.step import MAX_LOGIT_ROWS
from dist_moe.model.workspace import workspace_bytes
from dist_moe.parallel import host_sums, token_exchange
from dist_moe.parallel.plan import Plan
from dist_moe.parallel.world import AgreedError, World
from dist_moe.store.manifest import Manifest
from dist_moe.store.unit_parts import unit_sizes, units_bytes
from dist_moe.store.units import chunks_per_expert

logger = logging.getLogger(__name__)

# Of the memory that is left for routed experts; the rest is for what a run picks of the other layers.
_FILLED_SHARE = 0.8


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that the ranks of one host need together.

    Attributes:
        weights_bytes: Their share of the store, each unit once: mapped, so ranks share it and the system may drop it;
            0 for a store that lies in memory.
        active_bytes: The part of it that every token reads; without room for it no token is quick.
        kv_bytes: Keys and values of one full context.
        buffer_bytes: A step's buffers, kernel scratch, the memory that ranks exchange through, and copied weights.
    """

    weights_bytes: int
    active_bytes: int
    kv_bytes: int
    buffer_bytes: int

    @property
    def least_bytes(self) -> int:
        """Without this the run cannot work."""
        return self.active_bytes + self.kv_bytes + self.buffer_bytes

    @property
    def full_bytes(self) -> int:
        """With this no weight is read twice from the disk."""
        return self.weights_bytes + self.kv_bytes + self.buffer_bytes


@dataclass(frozen=True)
class Demand:
    """What decides a run's memory, besides the store and the plans."""

    kv: KvFormat
    context: int
    step_tokens: int
    copy_weights: bool = False


def check_memory(
    world: World, manifest: Manifest, plans: Sequence[Plan], demand: Demand, records: Sequence[StartRecord]
) -> list[MemoryNeed]:
    """Make sure that every host can hold its part; every rank knows all that decides it, so nothing is exchanged.

    Args:
        world: All ranks.
        manifest: The store's.
        plans: Every rank's share, by rank.
        demand: The options that count.
        records: What the ranks reported, by rank.

    Returns:
        Every host's need, by node.

    Raises:
        AgreedError: Some hosts lack memory; one line for each.
    """
    needs, lacking, slow = [], [], []
    for node in range(world.nodes):
        ranks = [rank for rank, where in enumerate(world.node_of_rank) if where == node]
        need = host_need(manifest, [plans[rank] for rank in ranks], [records[rank].threads for rank in ranks], demand)
        tightest = min((records[rank] for rank in ranks), key=lambda record: record.available_bytes)
        if tightest.medium == "memory":
            need = replace(need, weights_bytes=0, active_bytes=0)
        line = f"{world.hosts[ranks[0]]} {_describe(need, demand, tightest)}"
        logger.log(logging.INFO if world.is_leader else logging.DEBUG, "memory: %s", line)
        if 0 < tightest.available_bytes < need.least_bytes:
            lacking.append(f"{line}: that is not enough: {_ADVICE}")
        elif 0 < tightest.available_bytes < need.full_bytes:
            slow.append(f"{line}: weights will be read from the disk again and again: {_MORE_HOSTS}")
        needs.append(need)
    if lacking:
        raise AgreedError(tuple(lacking), UsageError.exit_code)
    for line in slow if world.is_leader else ():
        logger.warning("%s", line)
    return needs


def has_room(
    world: World, manifest: Manifest, demand: Demand, records: Sequence[StartRecord], plans: Sequence[Plan]
) -> bool:
    """Whether every host's memory holds all that its ranks may read, as far as is known. See `check_memory`."""
    for node in range(world.nodes):
        ranks = [rank for rank, where in enumerate(world.node_of_rank) if where == node]
        need = host_need(manifest, [plans[rank] for rank in ranks], [records[rank].threads for rank in ranks], demand)
        available_bytes = min(records[rank].available_bytes for rank in ranks)
        if records[ranks[0]].medium != "memory" and 0 < available_bytes < need.full_bytes:
            return False
    return True


def layers_with_room(world: World, need: MemoryNeed, records: Sequence[StartRecord], layers: int) -> int:
    """Of how many layers the routed experts stay in memory once they are read: all, or somewhat less than have room.

    Args:
        world: All ranks.
        need: Of this rank's host, as `check_memory` found it.
        records: What the ranks reported, by rank.
        layers: Of the model.
    """
    mates = [record for record, node in zip(records, world.node_of_rank, strict=True) if node == world.node]
    available_bytes = min(record.available_bytes for record in mates)
    if available_bytes == 0 or available_bytes >= need.full_bytes:
        return layers
    routed_bytes = need.full_bytes - need.least_bytes
    return int(_FILLED_SHARE * layers * (available_bytes - need.least_bytes) / routed_bytes)


def host_need(manifest: Manifest, plans: Sequence[Plan], threads: Sequence[int], demand: Demand) -> MemoryNeed:
    """What the ranks of one host need together.

    Args:
        manifest: The store's; that of one which is not written yet has no files.
        plans: These ranks' shares.
        threads: Compute threads of each of them.
        demand: The options that count.
    """
    config = manifest.config
    always_bytes, chunk_bytes, picked_bytes = _weights(manifest, plans)
    embedding_bytes = config.vocabulary * config.model_dim * (2 if manifest.embedding_format.label == "bf16" else 4)
    common_bytes = manifest.common_file_bytes
    blocks = -(-demand.context // BLOCK_POSITIONS)
    kv_heads = sum(len(plan.kv_heads) for plan in plans)
    copied_bytes = 0
    if demand.copy_weights:
        copied_bytes = sum(sum(_weights(manifest, [plan])[:2]) for plan in plans)
        always_bytes = chunk_bytes = picked_bytes = 0
    return MemoryNeed(
        weights_bytes=common_bytes + always_bytes + chunk_bytes,
        active_bytes=common_bytes - embedding_bytes + always_bytes + picked_bytes,
        kv_bytes=blocks * config.layers * kv_heads * kv_block_bytes(demand.kv, config.head_dim),
        buffer_bytes=copied_bytes
        + sum(_buffers(manifest, plan, count, demand.step_tokens) for plan, count in zip(plans, threads, strict=True)),
    )


def _weights(manifest: Manifest, plans: Sequence[Plan]) -> tuple[int, int, int]:
    """Bytes of these ranks' units, each once: what every token reads, all routed chunks, and the picked ones of them.

    A token picks K of E experts; this host's part of them is K / E of its chunks, as the mean over tokens has it.
    """
    config = manifest.config
    heads = {head for plan in plans for head in plan.heads}
    kv_heads = {head for plan in plans for head in plan.kv_heads}
    always_bytes = sum(units_bytes(manifest, "vocabulary", 0, plan.vocabulary_blocks) for plan in plans)
    chunk_bytes = 0
    for layer in range(config.layers):
        always_bytes += units_bytes(manifest, "head", layer, heads) + units_bytes(manifest, "kv_head", layer, kv_heads)
        own_bytes = _chunk_bytes(manifest, plans, layer)
        if config.is_dense(layer):
            always_bytes += own_bytes
        else:
            chunk_bytes += own_bytes
    return always_bytes, chunk_bytes, chunk_bytes * config.experts_per_token // max(1, config.experts)


def _chunk_bytes(manifest: Manifest, plans: Sequence[Plan], layer: int) -> int:
    """Of the chunks that these ranks may read; a placement gives a host more of one layer than of another."""
    size_C = unit_sizes(manifest, "chunk", layer)
    read_C = np.zeros(len(size_C), np.bool_)
    for plan in plans:
        read_C[plan.readable_chunks(layer)] = True
    return int(size_C[read_C].sum())


def _buffers(manifest: Manifest, plan: Plan, threads: int, step_tokens: int) -> int:
    """Bytes of one rank's buffers: a step's arrays, each thread's sums, gathered logits, and its exchange slots."""
    config = manifest.config
    most_chunks = max(
        config.layer_experts(layer) * chunks_per_expert(config, manifest.group_size, layer)
        for layer in range(config.layers)
    )
    step_bytes = workspace_bytes(
        config, plan, quantized=manifest.formats.quantized, max_tokens=step_tokens, max_chunks=most_chunks
    )
    # Scratch grows by half more than was asked for.
    thread_bytes = threads * step_tokens * config.model_dim * 8 * 3 // 2 if threads > 1 else 0
    logits_bytes = MAX_LOGIT_ROWS * config.vocabulary * 4 if plan.rank == 0 and plan.ranks > 1 else 0
    # Where ranks share memory and tokens travel, their operands pass through two arrays on the way to a host's first.
    token_bytes = 2 * step_tokens * config.model_dim * 4 if plan.ranks > 1 else 0
    link_bytes = _link_bytes(plan.nodes, step_tokens, config.model_dim) if plan.local_rank == 0 else 0
    return step_bytes + thread_bytes + logits_bytes + token_bytes + link_bytes + NODE_RANK_BYTES


def _link_bytes(hosts: int, step_tokens: int, model_dim: int) -> int:
    """Messages to and from every host on the rank that speaks for one: sums, and tokens; as many as a step has."""
    if hosts == 1:
        return 0
    bound = SumsCodec(WireFormat.EXACT).bound
    token_bytes = token_exchange.SLOTS * max(token_exchange.MOST_BYTES, bound(model_dim))
    rooms_bytes = (hosts * host_sums.SLOTS * bound(host_sums.MOST_SUMS), hosts * token_bytes)
    return sum(2 * min(room_bytes, bound(step_tokens * model_dim)) for room_bytes in rooms_bytes)


def _describe(need: MemoryNeed, demand: Demand, tightest: StartRecord) -> str:
    known = tightest.available_bytes > 0
    there = f"has {show_bytes(tightest.available_bytes)} ({tightest.memory_limit})" if known else "hides its own"
    return (
        f"needs {show_bytes(need.full_bytes)} (weights {show_bytes(need.weights_bytes)}, of which a token reads "
        f"{show_bytes(need.active_bytes)}; KV cache {show_bytes(need.kv_bytes)} for {demand.context} positions in "
        f"{demand.kv.label}; buffers {show_bytes(need.buffer_bytes)}) and {there}"
    )


_ADVICE = "lower --ctx or --prefill-chunk, take --kv q8 or a store of fewer bits, free memory, or start on more hosts"
_MORE_HOSTS = "take a store of fewer bits, free memory, or start on more hosts"
