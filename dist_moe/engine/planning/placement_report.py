"""What a placement comes to: each node's part, and the straggling to expect without and with it.

Shape suffixes: N nodes, C chunks of one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dist_moe.engine.planning.placing import SEARCH_SAMPLES
from dist_moe.engine.planning.work_simulation import Sets, Simulation
from dist_moe.engine.routing.routing_profile import RoutingProfile
from dist_moe.parallel.holdings import Held
from dist_moe.split import whole_chunks
from dist_moe.store.manifest import Manifest
from dist_moe.store.placement import Placement, indices_of
from dist_moe.store.unit_parts import units_bytes
from dist_moe.store.units import UnitKind

BATCHES = (1, 16)  # tokens of the simulated steps


@dataclass(frozen=True)
class NodeFacts:
    """One node's part; `shard_bytes` are those of its units."""

    weight: int
    heads: int
    vocabulary_blocks: int
    experts_per_layer: float
    shard_bytes: int


@dataclass(frozen=True)
class Straggling:
    """The busiest node's time with experts over the fair share, mean over layers and steps of `batch` tokens."""

    batch: int
    before: float
    after: float


def node_facts(manifest: Manifest, placement: Placement) -> list[NodeFacts]:
    """Each node's part of a model."""
    config, found = manifest.config, []
    routed = [layer for layer in range(config.layers) if not config.is_dense(layer)]
    for weight, shard in zip(placement.node_weights, placement.shards, strict=True):
        total = 0
        kinds: tuple[UnitKind, ...] = ("head", "kv_head", "chunk")
        places = [(kind, layer) for kind in kinds for layer in range(config.layers)]
        for kind, layer in [*places, ("vocabulary", 0)]:
            total += units_bytes(manifest, kind, layer, indices_of(shard.runs(kind, layer)))
        experts = [
            len(indices_of(shard.runs("chunk", layer))) / manifest.layer_chunks_per_expert(layer) for layer in routed
        ]
        found.append(
            NodeFacts(
                weight=weight,
                heads=len(indices_of(shard.heads)),
                vocabulary_blocks=len(indices_of(shard.vocabulary)),
                experts_per_layer=float(np.mean(experts)) if experts else 0.0,
                shard_bytes=total,
            )
        )
    return found


def simulate_straggling(manifest: Manifest, profile: RoutingProfile, placement: Placement) -> list[Straggling]:
    """What `shard --nodes` would give, and the placement, on the profile's samples."""
    nodes = len(placement.shards)
    before, after = unplaced(manifest, nodes), placed(placement)
    weights = placement.node_weights
    return [
        Straggling(
            batch,
            expected_straggling(manifest, profile, before, weights, batch),
            expected_straggling(manifest, profile, after, weights, batch),
        )
        for batch in BATCHES
    ]


def expected_straggling(
    manifest: Manifest, profile: RoutingProfile, held: Callable[[int], Held], weights: tuple[int, ...], batch: int
) -> float:
    """Mean over routed layers and sampled steps of `batch` tokens of the busiest node's time over the fair share."""
    found = []
    for index, layer in enumerate(profile.layers):
        chunks = manifest.layer_chunks_per_expert(layer)
        simulation = Simulation(judging_sets(profile, index), manifest.config.experts, chunks, weights, batch)
        found.append(simulation.straggling(held(layer)))
    return float(np.mean(found))


def unplaced(manifest: Manifest, nodes: int) -> Callable[[int], Held]:
    """What `shard --nodes` gives each node of a layer, bool [N, C]: a run of whole experts."""

    def held(layer: int) -> Held:
        experts, chunks = manifest.config.experts, manifest.layer_chunks_per_expert(layer)
        held_NC = np.zeros((nodes, experts * chunks), np.bool_)
        for node in range(nodes):
            held_NC[node, whole_chunks(experts, chunks, nodes, node)] = True
        return held_NC

    return held


def placed(placement: Placement) -> Callable[[int], Held]:
    """What a placement gives each node of a layer, bool [N, C]."""

    def held(layer: int) -> Held:
        held_NC = np.zeros((len(placement.shards), placement.counts.chunks[layer]), np.bool_)
        for node, shard in enumerate(placement.shards):
            held_NC[node, indices_of(shard.runs("chunk", layer))] = True
        return held_NC

    return held


def judging_sets(profile: RoutingProfile, index: int) -> Sets:
    """Samples of a layer that no search has seen, if there are enough."""
    sets_SK: Sets = profile.sets_LSK[index]
    return sets_SK[SEARCH_SAMPLES:] if len(sets_SK) >= 2 * SEARCH_SAMPLES else sets_SK
