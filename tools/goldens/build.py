"""Builds, writes and loads checkpoint directories through transformers."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from goldens.specs import Spec

EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def seed_of(name: str) -> int:
    """The seed of a named thing: its CRC-32, so that adding a model leaves the others alone."""
    return zlib.crc32(name.encode())


def fill(module: torch.nn.Module, name: str, std: float = 0.25) -> None:
    """Gives every parameter random values that keep logits lively.

    Norm weights lie around 1, biases are not zero, matrices have a wide spread: with transformers' 0.02 the logits
    would hardly vary and a wrong layer could pass.
    """
    generator = torch.Generator().manual_seed(seed_of(name))
    with torch.no_grad():
        for key, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in key else std * noise)


def write_model(spec: Spec, directory: Path) -> None:
    """Writes the checkpoint of a spec, then edits config.json where the old spelling is asked for."""
    config = Qwen3Config(**spec.config) if spec.dense else Qwen3MoeConfig(**spec.config)
    model = Qwen3ForCausalLM(config) if spec.dense else Qwen3MoeForCausalLM(config)
    fill(model, spec.name)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    limit = {"max_shard_size": spec.shard_size} if spec.shard_size else {}
    model.to(getattr(torch, spec.dtype)).save_pretrained(directory, save_original_format=not spec.fused, **limit)
    (directory / "generation_config.json").unlink(missing_ok=True)
    for file in directory.iterdir():
        file.chmod(0o644)  # safetensors makes its files readable by their owner alone
    if spec.old_spelling:
        respell(spec, directory)


def respell(spec: Spec, directory: Path) -> None:
    """Rewrites config.json as transformers 4 wrote it, and checks that it still means the same."""
    ids = torch.arange(40)[None] % spec.config["vocab_size"]
    before = logits_of(load(directory), ids)
    path = directory / "config.json"
    path.write_text(json.dumps(old_config(json.loads(path.read_text()), spec), indent=2) + "\n")
    if not torch.equal(before, logits_of(load(directory), ids)):
        raise SystemExit(f"{spec.name}: the old spelling of config.json changes the logits")


def old_config(config: dict[str, Any], spec: Spec) -> dict[str, Any]:
    """The old spelling of a config: rope_theta, rope_scaling, num_experts, torch_dtype; then the spec's own edits."""
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {spec.rope_type_key: kind, **parameters}
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.51.0"
    config.pop("layer_types", None)
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    for key, value in (spec.old or {}).items():
        config[key] = value
        if value is None and key != "mlp_only_layers":
            del config[key]
    return dict(sorted(config.items()))


def load(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a directory for exact arithmetic: fp32 (or fp64), eager attention, eager experts."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True, **EAGER)
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise SystemExit(f"{directory.name}: transformers did not load it cleanly: {problems}")
    return model.eval()


def logits_of(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of whole sequences, without a cache."""
    with torch.no_grad():
        return model(ids_BT, use_cache=False).logits
