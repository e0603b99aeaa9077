"""ModelConfig <-> JSON; floats that enter the numerics travel as their bits (NUMERICS rule 3)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from dist_moe.model_config import ModelConfig
from dist_moe.store.fields import Fields

_ARCHITECTURES = ("Qwen3MoeForCausalLM", "Qwen3ForCausalLM")
_LARGEST = 2**31 - 1


def model_to_json(config: ModelConfig) -> dict[str, Any]:
    """A JSON object with one key per field."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {
        **values,
        "dense_layers": list(config.dense_layers),
        "eps": _bits(config.eps),
        "score_scale": _bits(config.score_scale),
        "attention_factor": _bits(config.attention_factor),
        "inv_freq": [int(bits) for bits in config.inv_freq.astype(np.float32).view(np.uint32)],
    }


def model_from_json(entry: Fields) -> ModelConfig:
    """The inverse of `model_to_json`.

    Raises:
        StoreError: A field is missing, unknown, of another type or out of range.
    """
    config = ModelConfig(
        architecture=entry.choice("architecture", _ARCHITECTURES),
        layers=entry.integer("layers", 1, 100_000),
        model_dim=entry.integer("model_dim", 1, _LARGEST),
        heads=entry.integer("heads", 1, 8191),
        kv_heads=entry.integer("kv_heads", 1, 8191),
        head_dim=entry.integer("head_dim", 2, 1 << 20),
        experts=entry.integer("experts", 0, 1 << 20),
        experts_per_token=entry.integer("experts_per_token", 0, 8191),
        expert_hidden=entry.integer("expert_hidden", 0, _LARGEST),
        dense_hidden=entry.integer("dense_hidden", 0, _LARGEST),
        dense_layers=tuple(entry.integers("dense_layers", 0, 99_999)),
        vocabulary=entry.integer("vocabulary", 1, _LARGEST),
        max_positions=entry.integer("max_positions", 1, 2**62),
        norm_topk_prob=entry.flag("norm_topk_prob"),
        attention_bias=entry.flag("attention_bias"),
        tied_embeddings=entry.flag("tied_embeddings"),
        eps=_float(entry.integer("eps", 0, 2**32 - 1)),
        score_scale=_float(entry.integer("score_scale", 0, 2**32 - 1)),
        attention_factor=_float(entry.integer("attention_factor", 0, 2**32 - 1)),
        inv_freq=np.array(entry.integers("inv_freq", 0, 2**32 - 1), dtype=np.uint32).view(np.float32),
    )
    entry.done()
    _check(entry, config)
    return config


def _check(entry: Fields, config: ModelConfig) -> None:
    dense = config.dense_layers
    sparse = len(dense) < config.layers
    positive = np.isfinite(config.inv_freq) & (config.inv_freq >= 0)
    entry.require(config.heads % config.kv_heads == 0, "'heads' must be a multiple of 'kv_heads'")
    entry.require(config.head_dim % 2 == 0, "'head_dim' must be even")
    entry.require(list(dense) == sorted(set(dense)), "'dense_layers' must ascend")
    entry.require(all(layer < config.layers for layer in dense), "'dense_layers' must lie below 'layers'")
    entry.require(not dense or config.dense_hidden > 0, "'dense_hidden' must be positive with dense layers")
    entry.require(not sparse or config.expert_hidden > 0, "'expert_hidden' must be positive with expert layers")
    entry.require(
        not sparse or 1 <= config.experts_per_token <= config.experts,
        "'experts_per_token' must lie between 1 and 'experts'",
    )
    entry.require(len(config.inv_freq) == config.head_dim // 2, "'inv_freq' must have head_dim / 2 values")
    entry.require(bool(positive.all()), "'inv_freq' must be finite and not negative")
    entry.require(bool(np.isfinite(config.eps) and config.eps >= 0), "'eps' must be finite and not negative")
    entry.require(bool(0 < config.score_scale <= 1), "'score_scale' must be a number from 0 to 1")
    factor = config.attention_factor
    entry.require(bool(np.isfinite(factor) and factor > 0), "'attention_factor' must be finite and positive")


def _bits(value: np.float32) -> int:
    return int(np.float32(value).view(np.uint32))


def _float(bits: int) -> np.float32:
    value: np.float32 = np.uint32(bits).view(np.float32)
    return value
