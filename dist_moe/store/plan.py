"""What a store will be: the options that decide its bytes, and the manifest that follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import dist_moe
from dist_moe import files
from dist_moe.checkpoint.gguf_names import model_name
from dist_moe.errors import UsageError
from dist_moe.kernels.formats import ScaleChoice, WeightFormat
from dist_moe.model_config import ModelConfig
from dist_moe.store.formats import ModelFormats, check_formats
from dist_moe.store.importance import Importance
from dist_moe.store.manifest import Manifest
from dist_moe.store.placement import EXPERT_LAYOUTS, PLACED, Placement, ShardUnits, check_placement, place


@dataclass(frozen=True)
class StoreOptions:
    """How to make a store. The first eight decide its bytes."""

    nodes: int = 1
    format: WeightFormat = WeightFormat.Q4
    group_size: int = 32  # weights per scale, 0 for whole rows
    formats: ModelFormats | None = None  # of each matrix, in place of format; of group_size, too, if one is quantized
    experts: str = "whole"  # or "sliced"
    scales: ScaleChoice | None = None  # of q8 and q4; None: mse if any matrix is q4, else absmax
    importance: Importance | None = None  # of the columns of matrices whose scales are searched for (mse)
    placement: Placement | None = None  # takes the place of nodes and experts
    force: bool = False  # replace a store that stands there
    allow_nonfinite: bool = False  # pack NaN and infinite weights, too
    wait: bool = False  # for another process that is writing the same store
    replace_damaged: bool = False  # a store of our own cache: what cannot be used there is packed again
    full_check: bool = False  # of large files that are there already: every byte instead of the header
    threads: int = 0  # of the kernels that pack; 0 takes every CPU that this process may use

    def model_formats(self, config: ModelConfig) -> ModelFormats:
        """The format of each matrix of a model."""
        return self.formats or ModelFormats.uniform(config, self.format, self.group_size)

    def scale_choice(self, formats: ModelFormats) -> ScaleChoice:
        """How scales are chosen for these formats; absmax where there are none."""
        if not formats.quantized:
            return ScaleChoice.ABSMAX
        return formats.default_scales if self.scales is None else self.scales


class WeightSource(Protocol):
    """What the plan of a store asks of the model that it is made from; a `Checkpoint` is one."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""

    @property
    def path(self) -> Path:
        """Where it comes from; the last part is its name."""

    def names(self) -> list[str]:
        """The logical names of its tensors."""

    def source_dtype(self, name: str) -> str:
        """What a tensor is kept as: "bf16", "f16" or "f32"."""

    def fingerprint(self) -> str:
        """A text that tells it apart from other models and other versions of itself."""

    def text_files(self) -> Mapping[str, bytes]:
        """Small files that a store takes along."""


def plan_store(source: WeightSource, options: StoreOptions) -> Manifest:
    """The manifest of the store that the options make of a checkpoint, before any file is written.

    Raises:
        UsageError: The model cannot be stored like that; says what works.
    """
    config = source.config
    _check_nodes(config, options)
    formats = options.model_formats(config)
    group_size = options.group_size if formats.group_size is None else formats.group_size
    check_formats(config, formats, group_size)
    scales = options.scale_choice(formats)
    if options.importance is not None and scales != ScaleChoice.MSE:
        raise UsageError(
            "--importance weights the search for scales: give --quant q4 or q8 with --scales mse, or leave it out"
        )
    routers = {source.source_dtype(name) for name in source.names() if name.endswith(".router")}
    uncut = Manifest(
        config=config,
        source_name=source_name(source.path),
        source_fingerprint=source.fingerprint(),
        formats=formats,
        group_size=group_size,
        router_format=_exact_format(routers),
        embedding_format=_exact_format({source.source_dtype("embedding")}),
        experts=options.experts,
        nodes=0,
        shards=(),
        package_version=dist_moe.__version__,
        files=(),
        scales=scales,
        importance="" if options.importance is None else options.importance.fingerprint,
    )
    return cut(uncut, options)


def cut(manifest: Manifest, options: StoreOptions) -> Manifest:
    """The plan of a store with the same units in other shards, as `nodes`, `experts` or `placement` say.

    Raises:
        UsageError: The model cannot be cut like that; says what works.
    """
    _check_nodes(manifest.config, options)
    placement = options.placement
    if placement is not None:
        check_placement(placement, manifest.config, manifest.group_size)
    return replace(
        manifest,
        experts=options.experts if placement is None else PLACED,
        nodes=_nodes(options),
        shards=_shards(manifest, options),
        package_version=dist_moe.__version__,
        files=(),
        node_weights=() if placement is None else placement.node_weights,
    )


def _nodes(options: StoreOptions) -> int:
    return options.nodes if options.placement is None else len(options.placement.shards)


def _check_nodes(config: ModelConfig, options: StoreOptions) -> None:
    nodes = _nodes(options)
    if not 1 <= nodes <= config.heads:
        raise UsageError(
            f"--nodes {nodes}: this model has {config.heads} query heads and each node needs one; "
            f"give 1 to {config.heads}"
        )
    if options.experts not in EXPERT_LAYOUTS:
        raise UsageError(f"--experts {options.experts}; give one of {', '.join(EXPERT_LAYOUTS)}")


def _shards(manifest: Manifest, options: StoreOptions) -> tuple[ShardUnits, ...]:
    if options.placement is not None:
        return options.placement.shards
    config, group_size, nodes = manifest.config, manifest.group_size, options.nodes
    return tuple(place(config, group_size, options.experts, nodes, node) for node in range(nodes))


def source_name(source: Path) -> str:
    """What to call a model: its directory's or (first) file's name, or the repository's in a Hugging Face cache."""
    path = source.resolve()
    if files.is_file(source):
        name = model_name(source)
    elif path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        name = path.parent.parent.name.split("--")[-1]
    else:
        name = path.parent.name if path.name == "model" else path.name
    return "".join(character if character.isprintable() else "_" for character in name) or "model"


def _exact_format(source_dtypes: set[str]) -> WeightFormat:
    """How routers and the embedding are kept: bf16 if the source is bf16 throughout, else f32; both are exact."""
    return WeightFormat.BF16 if source_dtypes == {"bf16"} else WeightFormat.F32
