"""Which units stand in which of N shards: pure functions of the model's sizes and the layout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.errors import UsageError
from dist_moe.model_config import ModelConfig
from dist_moe.split import contiguous, head_range_kv_heads, sliced_chunks, whole_chunks
from dist_moe.store.units import UnitKind, chunks_per_expert, describe_unit, unit_count

Runs = tuple[tuple[int, int], ...]  # ascending half-open ranges [first, stop) that do not touch
Indices = npt.NDArray[np.int64]

EXPERT_LAYOUTS = ("whole", "sliced")
PLACED = "placed"  # what a manifest says of shards that were cut as a placement says


def runs_of(indices: Iterable[int]) -> Runs:
    """Ascending indices as runs."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return tuple(runs)


def indices_of(runs: Runs) -> Indices:
    """Runs as an ascending array of indices."""
    first_n, stop_n = np.array(runs, np.int64).reshape(-1, 2).T
    length_n = stop_n - first_n
    # Where each run begins, less the count of indices before it; adding 0, 1, 2, ... walks through all runs.
    base_n = first_n - (np.cumsum(length_n) - length_n)
    return np.repeat(base_n, length_n) + np.arange(int(length_n.sum()))


@dataclass(frozen=True)
class LayerRuns:
    """The chunks that a shard holds in each of the layers [first_layer, stop_layer)."""

    first_layer: int
    stop_layer: int
    runs: Runs


@dataclass(frozen=True)
class ShardUnits:
    """All units of one shard; heads and KV heads are the same in every layer."""

    heads: Runs
    kv_heads: Runs
    vocabulary: Runs
    chunks: tuple[LayerRuns, ...]  # ascending, together they cover every layer

    def runs(self, kind: UnitKind, layer: int) -> Runs:
        """The units of one kind in one layer; `layer` is ignored for the vocabulary."""
        if kind == "chunk":
            return next(part.runs for part in self.chunks if part.first_layer <= layer < part.stop_layer)
        return {"head": self.heads, "kv_head": self.kv_heads, "vocabulary": self.vocabulary}[kind]


@dataclass(frozen=True)
class UnitCounts:
    """How many units of each kind a model has; of chunks, in each layer."""

    heads: int
    kv_heads: int
    vocabulary: int
    chunks: tuple[int, ...]

    def of(self, kind: UnitKind, layer: int) -> int:
        """Units of one kind in one layer."""
        counts = {"head": self.heads, "kv_head": self.kv_heads, "vocabulary": self.vocabulary}
        return self.chunks[layer] if kind == "chunk" else counts[kind]


def unit_counts(config: ModelConfig, group_size: int) -> UnitCounts:
    """Of a model whose chunks follow from the group size."""
    return UnitCounts(
        heads=config.heads,
        kv_heads=config.kv_heads,
        vocabulary=unit_count(config, group_size, "vocabulary", 0),
        chunks=tuple(unit_count(config, group_size, "chunk", layer) for layer in range(config.layers)),
    )


@dataclass(frozen=True)
class Placement:
    """Which units each node gets, of which some may stand in several shards.

    Attributes:
        model: The model's name.
        node_weights: How much work each node does in the same time; a whole number from 1.
        counts: The model's units.
        shards: One per node.
    """

    model: str
    node_weights: tuple[int, ...]
    counts: UnitCounts
    shards: tuple[ShardUnits, ...]


def check_placement(placement: Placement, config: ModelConfig, group_size: int) -> None:
    """Refuse a placement of another model, or one that leaves a unit out.

    Raises:
        UsageError: Says what does not fit.
    """
    advice = "make a placement of this model with dist-moe place"
    counts = unit_counts(config, group_size)
    if placement.counts != counts:
        raise UsageError(
            f"the placement of {placement.model} does not fit this model: it has {describe_counts(placement.counts)}, "
            f"the model {describe_counts(counts)}; {advice}"
        )
    kinds: tuple[UnitKind, ...] = ("head", "kv_head", "vocabulary")
    places: list[tuple[UnitKind, int]] = [(kind, 0) for kind in kinds]
    for kind, layer in [*places, *(("chunk", layer) for layer in range(config.layers))]:
        missing = np.ones(counts.of(kind, layer), np.bool_)
        for shard in placement.shards:
            missing[indices_of(shard.runs(kind, layer))] = False
        if missing.any():
            unit = describe_unit(config, group_size, kind, layer, int(missing.argmax()))
            raise UsageError(f"the placement of {placement.model} gives {unit} to no node; {advice}")
    for number, shard in enumerate(placement.shards, 1):
        heads, kv_heads = indices_of(shard.heads), {*indices_of(shard.kv_heads).tolist()}
        if not {*(heads // config.heads_per_kv_head).tolist()} <= kv_heads:
            raise UsageError(f"the placement of {placement.model} gives node {number} heads without K and V; {advice}")


def describe_counts(counts: UnitCounts) -> str:
    """Units in words, for error messages."""
    chunks = sorted({*counts.chunks})
    return (
        f"{len(counts.chunks)} layers of {' or '.join(map(str, chunks))} chunks, {counts.heads} query heads, "
        f"{counts.kv_heads} KV heads, {counts.vocabulary} vocabulary blocks"
    )


def place(config: ModelConfig, group_size: int, layout: str, nodes: int, index: int) -> ShardUnits:
    """The units of shard `index` of `nodes`.

    Args:
        config: The model.
        group_size: Weights per scale, which decides the chunks.
        layout: `whole` experts, or experts `sliced` over all shards.
        nodes: How many shards there are.
        index: Which shard, from 0.
    """
    heads = contiguous(config.heads, nodes, index)
    chunks: list[LayerRuns] = []
    for layer in range(config.layers):
        per_expert = chunks_per_expert(config, group_size, layer)
        split = whole_chunks if layout == "whole" else sliced_chunks
        runs = runs_of(split(config.layer_experts(layer), per_expert, nodes, index))
        if chunks and chunks[-1].runs == runs:
            chunks[-1] = LayerRuns(chunks[-1].first_layer, layer + 1, runs)
        else:
            chunks.append(LayerRuns(layer, layer + 1, runs))
    return ShardUnits(
        heads=runs_of(heads),
        kv_heads=runs_of(head_range_kv_heads(heads, config.heads_per_kv_head)),
        vocabulary=runs_of(contiguous(unit_count(config, group_size, "vocabulary", 0), nodes, index)),
        chunks=tuple(chunks),
    )


def shard_name(index: int, nodes: int) -> str:
    """The file name of shard `index` (from 0; names count from 1)."""
    return f"shard-{index + 1:05d}-of-{nodes:05d}.safetensors"
