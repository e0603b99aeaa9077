"""What `-m` names, and the store of it on this host."""

from __future__ import annotations

from pathlib import Path

from dist_moe.cli.options import ModelOptions
from dist_moe.cli.shard import ShardProgress
from dist_moe.engine import job
from dist_moe.parallel.world import World
from dist_moe.store import models
from dist_moe.store.models import ModelSource, cache_directory, is_source, packed_directory, synthetic_source

__all__ = [
    "ModelSource",
    "cache_directory",
    "find_model",
    "is_source",
    "local_store",
    "packed_directory",
    "synthetic_source",
]


def find_model(options: ModelOptions) -> ModelSource:
    """Tell the forms of `-m` apart.

    Raises:
        UsageError: The path is none of them, or --quant contradicts the store.
        StoreError: The store's manifest is damaged.
    """
    return models.find_model(options.model, options.quant)


def local_store(world: World, source: ModelSource, *, full_check: bool) -> Path:
    """The store of a model on this host; packing shows its progress (collective).

    Raises:
        AgreedError: Some node could not pack it.
    """
    return job.local_store(world, source, full_check=full_check, show=ShardProgress)
