"""The manifest of a model's store that exists, or that would be made of it, without reading a weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dist_moe import files
from dist_moe.checkpoint.model_toml import read_model_toml
from dist_moe.checkpoint.source import open_source
from dist_moe.kernels import WeightFormat
from dist_moe.store.manifest import MANIFEST_NAME, Manifest, read_manifest
from dist_moe.store.models import find_model
from dist_moe.store.plan import StoreOptions, plan_store
from dist_moe.store.synthetic import synthetic_model


def describe_model(model: str, quant: str | None) -> Manifest:
    """What a model's store is, or would be, without reading a weight.

    Args:
        model: A store, a Hugging Face directory, a GGUF or QW3W file or a file of configs/.
        quant: The format of the weights, where it is not decided yet.

    Raises:
        UsageError: The path is none of them, or `quant` contradicts the store.
        CheckpointError, StoreError: The model's files are damaged or not supported.
    """
    path = Path(model)
    if path.suffix == ".toml" and files.is_file(path):
        fmt = WeightFormat.parse(quant or "q4")
        plan = plan_store(synthetic_model(read_model_toml(path), path.stem, None), StoreOptions(format=fmt))
        return replace(plan, source_name=path.stem)
    source = find_model(model, quant, "")
    if source.format is None:
        return read_manifest(source.path / MANIFEST_NAME)
    return plan_store(open_source(source.path), StoreOptions(format=source.format))
