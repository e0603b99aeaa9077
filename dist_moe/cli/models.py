"""What `-m` names: a store, a Hugging Face directory (packed once into the cache directory), or the bundled demo."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from dist_moe.checkpoint.hf_config import read_hf_config
from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.cli.options import ModelOptions
from dist_moe.cli.shard import ShardProgress
from dist_moe.demo import demo_model_directory
from dist_moe.errors import DistMoeError, UsageError
from dist_moe.kernels import WeightFormat
from dist_moe.model_config import ModelConfig
from dist_moe.parallel.world import World
from dist_moe.store.convert import convert
from dist_moe.store.manifest import FORMAT_VERSION, MANIFEST_NAME, NUMERICS_VERSION, PROGRESS_NAME, read_manifest
from dist_moe.store.plan import StoreOptions, source_name

DEFAULT_FORMAT = WeightFormat.Q4
# Four bits cost a model as small as the demo visible quality, and save nothing worth having.
DEMO_FORMAT = WeightFormat.Q8


@dataclass(frozen=True)
class ModelSource:
    """A model before any weight is read; `format` is None for a store, which has its own."""

    directory: Path
    format: WeightFormat | None

    def read_config(self) -> ModelConfig:
        """The model's sizes.

        Raises:
            StoreError: The store's manifest is damaged or of another version.
            CheckpointError: The checkpoint's config.json is damaged or of an unsupported model.
        """
        if self.format is None:
            return read_manifest(self.directory / MANIFEST_NAME).config
        return read_hf_config(self.directory)


def find_model(options: ModelOptions) -> ModelSource:
    """Tell the three forms of `-m` apart.

    Raises:
        UsageError: The path is none of them, or --quant contradicts the store.
        StoreError: The store's manifest is damaged.
    """
    wanted = WeightFormat.parse(options.quant) if options.quant else None
    if options.model is None:
        return ModelSource(demo_model_directory(), DEMO_FORMAT if wanted is None else wanted)
    directory = Path(options.model)
    if (directory / MANIFEST_NAME).is_file():
        _require_format(directory, wanted)
        return ModelSource(directory, None)
    if (directory / PROGRESS_NAME).is_file():
        raise UsageError(
            f"-m {directory}: this store is incomplete (dist-moe shard was interrupted or is still running): "
            "repeat its command, it continues where it stopped"
        )
    if (directory / "config.json").is_file():
        return ModelSource(directory, DEFAULT_FORMAT if wanted is None else wanted)
    found = "is a file" if directory.is_file() else "holds neither" if directory.is_dir() else "does not exist"
    raise UsageError(
        f"-m {directory}: expected a store (with {MANIFEST_NAME}) or a Hugging Face directory (with config.json), "
        f"but it {found}"
    )


def cache_directory() -> Path:
    """Where packed models are kept: $DIST_MOE_CACHE, else $XDG_CACHE_HOME/dist-moe, else ~/.cache/dist-moe."""
    if own := os.environ.get("DIST_MOE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist-moe"


def local_store(world: World, source: ModelSource) -> Path:
    """The store of a model on this host; one rank of each node packs it if need be, the others sleep (collective).

    Raises:
        AgreedError: Some node could not pack it.
    """
    if source.format is None:
        return source.directory
    directory, error = Path(), None
    if world.local_rank == 0:
        try:
            directory = _packed(source.directory, source.format, shows_progress=world.node == 0)
        except DistMoeError as own:
            error = own
    world.sleep_until_all()
    world.agree(error, "packing the model")
    return Path(world.gather_texts(str(directory))[world.node_of_rank.index(world.node)])


def _packed(source: Path, weights: WeightFormat, *, shows_progress: bool) -> Path:
    checkpoint = Checkpoint.open(source)
    options = StoreOptions(format=weights, wait=True)
    versions = f"{FORMAT_VERSION} {NUMERICS_VERSION} {options.group_size}"
    key = f"{source.resolve()}\n{checkpoint.fingerprint()}\n{versions}"
    name = f"{source_name(source)}-{weights.label}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    directory = cache_directory() / name
    with ShardProgress(quiet=not shows_progress) as progress:
        convert(checkpoint, directory, options, progress)
    return directory


def _require_format(store: Path, wanted: WeightFormat | None) -> None:
    if wanted is None:
        return
    found = read_manifest(store / MANIFEST_NAME).format
    if found != wanted:
        raise UsageError(
            f"--quant {wanted.label}: {store} is a store of {found.label} weights, which a run does not change: "
            "leave --quant out, or give the Hugging Face directory"
        )
