"""A placement of a model on nodes: how many experts each can keep, which ones, and its heads and vocabulary.

Shape suffixes: N nodes, E experts, C chunks of one layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from dist_moe.engine.planning.replicas import improve, pack
from dist_moe.engine.planning.work_simulation import Simulation
from dist_moe.engine.routing.routing_profile import SEED, RoutingProfile
from dist_moe.errors import UsageError
from dist_moe.model_config import ModelConfig
from dist_moe.parallel.cpu_limits import own_cores
from dist_moe.parallel.holdings import Held
from dist_moe.split import head_range_kv_heads, weighted
from dist_moe.store.manifest import Manifest
from dist_moe.store.placement import LayerRuns, Placement, ShardUnits, runs_of, unit_counts
from dist_moe.store.unit_parts import unit_sizes, units_bytes
from dist_moe.store.units import unit_count

SEARCH_SAMPLES = 256  # of the local search; the rest of a profile judges its result
_GIGABYTE = 10**9


@dataclass(frozen=True)
class Budget:
    """How much a node may hold: `copies` of all experts over the whole job, or `node_bytes` for the shard of each."""

    copies: Fraction | None = None
    node_bytes: int | None = None


def parse_budget(text: str) -> Budget:
    """`2x`: twice the experts over all nodes; `12GB` (10^9 bytes) or `12GiB`: each node's shard.

    Raises:
        UsageError: It is neither.
    """
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)\s*(x|GB|GiB|G)", text.strip(), re.IGNORECASE)
    amount = Fraction(found[1]) if found else Fraction(0)
    if found is None or amount <= 0:
        raise UsageError(f"--budget {text}: expected copies of the experts like 2x, or bytes of a node like 12GB")
    if found[2].lower() == "x":
        return Budget(copies=amount)
    return Budget(node_bytes=int(amount * (1 << 30 if found[2].lower() == "gib" else _GIGABYTE)))


def place_model(
    manifest: Manifest,
    profile: RoutingProfile | None,
    weights: Sequence[int],
    budget: Budget,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> Placement:
    """Decide what each node gets.

    Args:
        manifest: The model, as it will be packed.
        profile: Of its routing; None if no layer has experts.
        weights: How much work each node does in the same time.
        budget: How much a node may hold.
        progress: Told (placed layers, all layers).

    Raises:
        UsageError: The nodes cannot hold the model, or there are more nodes than query heads.
    """
    config, nodes = manifest.config, len(weights)
    if nodes > config.heads:
        raise UsageError(
            f"{nodes} nodes: this model has {config.heads} query heads and each node needs one: take fewer"
        )
    heads = weighted(config.heads, weights)
    blocks = weighted(unit_count(config, manifest.group_size, "vocabulary", 0), weights)
    kv_heads = [head_range_kv_heads(part, config.heads_per_kv_head) for part in heads]
    held_of: dict[int, Held] = {}
    if profile is not None:
        parts = zip(heads, kv_heads, blocks, strict=True)
        slots = _slots(manifest, weights, budget, [_other_bytes(manifest, *part) for part in parts])
        held_of = _place_layers(manifest, profile, slots, weights, progress)
    elif budget.node_bytes is not None:
        _require_dense_room(manifest, weights, budget.node_bytes, heads, kv_heads, blocks)
    layers = [_layer_of(manifest, layer, held_of, weights) for layer in range(config.layers)]
    shards = tuple(
        ShardUnits(runs_of(heads[node]), runs_of(kv_heads[node]), runs_of(blocks[node]), _joined(layers, node))
        for node in range(nodes)
    )
    return Placement(manifest.source_name, tuple(weights), unit_counts(config, manifest.group_size), shards)


def routed_layers(config: ModelConfig) -> tuple[int, ...]:
    """The layers with experts."""
    return tuple(layer for layer in range(config.layers) if not config.is_dense(layer))


def _expert_bytes(manifest: Manifest, layer: int) -> int:
    """Of all chunks of one expert, the largest of the layer, so that whichever a node gets has room."""
    return manifest.layer_chunks_per_expert(layer) * int(unit_sizes(manifest, "chunk", layer).max())


def _slots(manifest: Manifest, weights: Sequence[int], budget: Budget, other_bytes: Sequence[int]) -> list[int]:
    """How many experts of each layer every node may hold."""
    experts, nodes = manifest.config.experts, len(weights)
    if budget.copies is not None:
        if not budget.copies >= 1:
            raise UsageError(f"--budget {float(budget.copies):g}x: less than one copy of each expert: take 1x or more")
        return _proportional(min(int(budget.copies * experts), nodes * experts), weights, experts)
    assert budget.node_bytes is not None
    layer_bytes = sum(_expert_bytes(manifest, layer) for layer in routed_layers(manifest.config))
    _require_room(budget.node_bytes, other_bytes)
    slots = [min(experts, (budget.node_bytes - other) // layer_bytes) for other in other_bytes]
    if sum(slots) < experts:
        least = max(other_bytes) + -(-experts // nodes) * layer_bytes
        raise UsageError(
            f"--budget: {_gigabytes(budget.node_bytes)} on each of {nodes} nodes hold {sum(slots)} of {experts} "
            f"experts of each layer: give {_gigabytes(least)}, more nodes, or another --quant"
        )
    return slots


def _require_dense_room(
    manifest: Manifest,
    weights: Sequence[int],
    node_bytes: int,
    heads: Sequence[range],
    kv_heads: Sequence[range],
    blocks: Sequence[range],
) -> None:
    """Refuse a budget in bytes for which there is nothing to choose: without experts every part is given."""
    needed = []
    for node, parts in enumerate(zip(heads, kv_heads, blocks, strict=True)):
        needed.append(_other_bytes(manifest, *parts, whole_layers=False))
        for layer in range(manifest.config.layers):
            chunks = weighted(manifest.layer_chunks_per_expert(layer), weights)[node]
            needed[-1] += units_bytes(manifest, "chunk", layer, chunks)
    _require_room(node_bytes, needed)


def _require_room(node_bytes: int, needed: Sequence[int]) -> None:
    """Refuse a budget that is too small for what a node gets in any case."""
    if (most := max(needed)) > node_bytes:
        raise UsageError(
            f"--budget: {_gigabytes(node_bytes)} are too few for node {needed.index(most) + 1}, whose heads, "
            f"vocabulary blocks and dense layers take {_gigabytes(most)}: give more, more nodes, or another --quant"
        )


def _gigabytes(size: int) -> str:
    """As --budget takes it: 3 digits or more, rounded upwards, so that what is advised is enough."""
    digits = next((digits for digits in range(2, 6) if size * 10**digits >= 100 * _GIGABYTE), 6)
    return f"{-(-size * 10**digits // _GIGABYTE) / 10**digits:.{digits}f} GB"


def _proportional(total: int, weights: Sequence[int], most: int) -> list[int]:
    """`total` slots by weight, at most `most` each; what is cut off goes to the others."""
    slots = [0] * len(weights)
    for _ in range(total):
        open_nodes = [node for node in range(len(weights)) if slots[node] < most]
        slots[min(open_nodes, key=lambda node: (Fraction(slots[node] + 1, weights[node]), node))] += 1
    return slots


def _other_bytes(manifest: Manifest, heads: range, kv_heads: range, blocks: range, *, whole_layers: bool = True) -> int:
    """Bytes of a node's shard without experts; a dense layer as if it were all here, or not at all."""
    config = manifest.config
    total = units_bytes(manifest, "vocabulary", 0, blocks)
    for layer in range(config.layers):
        total += units_bytes(manifest, "head", layer, heads) + units_bytes(manifest, "kv_head", layer, kv_heads)
        total += _expert_bytes(manifest, layer) if whole_layers and config.is_dense(layer) else 0
    return total


def _place_layers(
    manifest: Manifest,
    profile: RoutingProfile,
    slots: Sequence[int],
    weights: Sequence[int],
    progress: Callable[[int, int], None],
) -> dict[int, Held]:
    """Per routed layer which node holds which expert, bool [N, E]; layers of equal routing are placed alike."""

    def key_of(index: int) -> tuple[bytes, bytes, int]:
        chunks = manifest.layer_chunks_per_expert(profile.layers[index])
        return profile.counts_LE[index].tobytes(), profile.sets_LSK[index].tobytes(), chunks

    def place(index: int) -> Held:
        load_E, sets_SK = profile.load_E(index), profile.sets_LSK[index][:SEARCH_SAMPLES]
        chunks = manifest.layer_chunks_per_expert(profile.layers[index])
        simulation = Simulation(sets_SK, manifest.config.experts, chunks, weights, 1)
        start_NE = pack(load_E, slots, weights)
        return improve(start_NE, simulation.straggling_of_experts, np.random.default_rng(SEED))

    keys = [key_of(index) for index in range(len(profile.layers))]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    held_of: dict[int, Held] = {}
    # Most of the time is spent in the kernels' simulation, which other threads do not wait for.
    with ThreadPoolExecutor(len(own_cores())) as pool:
        placed = {key: pool.submit(place, index) for key, index in first.items()}
        for index, (layer, key) in enumerate(zip(profile.layers, keys, strict=True), 1):
            held_of[layer] = placed[key].result()
            progress(index, len(profile.layers))
    return held_of


def _layer_of(manifest: Manifest, layer: int, held_of: dict[int, Held], weights: Sequence[int]) -> list[Iterable[int]]:
    """The chunks of a layer, by node; a dense one is cut by weight."""
    chunks = manifest.layer_chunks_per_expert(layer)
    if layer not in held_of:
        return [*weighted(chunks, weights)]
    return [np.flatnonzero(np.repeat(held_E, chunks)).tolist() for held_E in held_of[layer]]


def _joined(layers: Sequence[Sequence[Iterable[int]]], node: int) -> tuple[LayerRuns, ...]:
    """A node's chunks of all layers; neighbours that are alike as one."""
    parts: list[LayerRuns] = []
    for layer, chunks_N in enumerate(layers):
        runs = runs_of(chunks_N[node])
        if parts and parts[-1].runs == runs:
            parts[-1] = LayerRuns(parts[-1].first_layer, layer + 1, runs)
        else:
            parts.append(LayerRuns(layer, layer + 1, runs))
    return tuple(parts)
