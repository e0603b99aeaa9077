"""Stores made of tiny checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.checkpoint.source import Source
from dist_moe.store.convert import Conversion, convert
from dist_moe.store.placement import LayerRuns, Placement, ShardUnits, runs_of, unit_counts
from dist_moe.store.plan import StoreOptions
from helpers.tiny_model import TinyModel

# Awkward on purpose: no dimension is a multiple of another's tile, the last chunk and vocabulary block are padded.
ODD = TinyModel(
    layers=3,
    model_dim=36,
    heads=6,
    kv_heads=3,
    head_dim=32,
    experts=5,
    experts_per_token=2,
    expert_hidden=180,
    dense_hidden=150,
    dense_layers=(1,),
    vocabulary=300,
    bias=True,
)


def ignore(done_bytes: int, total_bytes: int, what: str) -> None:
    """Progress that nobody watches."""


def run_convert(source: Source, directory: Path, **options: object) -> Conversion:
    """Make a store on one thread; `options` are those of StoreOptions."""
    return convert(source, directory, replace(StoreOptions(threads=1), **options), ignore)  # type: ignore[arg-type]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, hidden ones included."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def placement_of(checkpoint: Checkpoint, nodes: int = 3, group_size: int = 32) -> Placement:
    """Heads and blocks in turn, every second chunk on two nodes, chunk 0 on all."""
    config = checkpoint.config
    counts = unit_counts(config, group_size)
    groups = config.heads_per_kv_head

    def owned(units: int, node: int) -> list[int]:
        return [unit for unit in range(units) if unit % nodes == node]

    def chunks(layer: int, node: int) -> list[int]:
        homes = [
            {chunk % nodes, *([(chunk + 1) % nodes] if chunk % 2 else [])} for chunk in range(counts.chunks[layer])
        ]
        return [chunk for chunk, home in enumerate(homes) if node in home or chunk == 0]

    shards = []
    for node in range(nodes):
        heads = owned(config.heads, node)
        layers = tuple(LayerRuns(layer, layer + 1, runs_of(chunks(layer, node))) for layer in range(config.layers))
        kv_heads = sorted({head // groups for head in heads})
        shards.append(ShardUnits(runs_of(heads), runs_of(kv_heads), runs_of(owned(counts.vocabulary, node)), layers))
    return Placement("odd", (3, 2, 1)[:nodes], counts, tuple(shards))


class Crash(Exception):
    """Stands for a power cut: no handler of ours sees it coming."""


def crash_on_third(real: Callable[..., object]) -> Callable[..., object]:
    """Wrap a function so that its third call dies."""
    calls = iter(range(10))

    def pack(*arguments: object) -> object:
        if next(calls) == 2:
            raise Crash
        return real(*arguments)

    return pack
