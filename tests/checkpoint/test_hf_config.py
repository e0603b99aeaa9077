"""config.json: every spelling of the same model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_moe.checkpoint.hf_config import read_hf_config
from dist_moe.model_config import ModelConfig

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
ABSENT = object()


def edited(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A config with other values; ABSENT removes a key."""
    return {key: value for key, value in (config | changes).items() if value is not ABSENT}


def dense_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same sizes as a dense Qwen3."""
    kept = {key: value for key, value in config.items() if not any(word in key for word in ("moe", "expert", "topk"))}
    return kept | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def read(directory: Path, config: object) -> ModelConfig:
    """What is read from a config.json."""
    (directory / "config.json").write_text(json.dumps(config))
    return read_hf_config(directory)


def same(left: ModelConfig, right: ModelConfig) -> bool:
    """Whether two configs are equal, arrays included."""
    pairs = ((getattr(left, item.name), getattr(right, item.name)) for item in dataclasses.fields(ModelConfig))
    return all(np.array_equal(one, other) and type(one) is type(other) for one, other in pairs)


def test_the_real_config(real_config: dict[str, Any], tmp_path: Path) -> None:
    config = read(tmp_path, real_config)
    assert config.architecture == "Qwen3MoeForCausalLM"
    assert (config.layers, config.model_dim, config.heads, config.kv_heads, config.head_dim) == (48, 2048, 32, 4, 128)
    assert (config.experts, config.experts_per_token, config.expert_hidden) == (128, 8, 768)
    assert (config.dense_layers, config.dense_hidden) == ((), 0)
    assert (config.vocabulary, config.max_positions) == (151936, 40960)
    assert (config.norm_topk_prob, config.attention_bias, config.tied_embeddings) == (True, False, False)
    assert config.eps == np.float32(1e-6)
    assert config.attention_factor == 1
    assert config.inv_freq.shape == (64,)
    assert config.inv_freq[0] == 1


NEW = {
    "rope_theta": ABSENT,
    "rope_scaling": ABSENT,
    "num_experts": ABSENT,
    "torch_dtype": ABSENT,
    "num_local_experts": 128,
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


@pytest.mark.parametrize(
    "spelling",
    [
        NEW,
        {"num_local_experts": 128},
        {"mlp_only_layers": None},
        {"mlp_only_layers": ABSENT, "decoder_sparse_step": ABSENT},
        {"attention_bias": ABSENT, "tie_word_embeddings": ABSENT, "use_sliding_window": ABSENT},
        {"sliding_window": 4096, "max_window_layers": 28},
        {"rope_scaling": {}},
        {"rope_scaling": ABSENT},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 1000000}, "rope_theta": 5.0},
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "linear", "factor": 2}},
        {"partial_rotary_factor": 1.0},
        {"torch_dtype": ABSENT},
        {"torch_dtype": "float32", "dtype": "float16"},
        {"layer_types": ["full_attention"] * 48},
        {"architectures": ABSENT},
        {"quantization_config": None},
    ],
)
def test_spellings_of_the_same_model(spelling: dict[str, Any], real_config: dict[str, Any], tmp_path: Path) -> None:
    assert same(read(tmp_path, edited(real_config, spelling)), read(tmp_path, real_config))


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}},
        {"rope_scaling": None, "rope_parameters": YARN},
        {"rope_scaling": YARN | {"type": "linear"}},
        {"rope_scaling": YARN | {"original_max_position_embeddings": 99}, "original_max_position_embeddings": 32768},
        {"rope_scaling": YARN | {"beta_fast": 32, "beta_slow": None, "truncate": True, "mscale": 0}},
        NEW | {"rope_parameters": YARN | {"rope_theta": 1000000.0}},
    ],
)
def test_spellings_of_yarn(spelling: dict[str, Any], real_config: dict[str, Any], tmp_path: Path) -> None:
    yarn = read(tmp_path, real_config | {"rope_scaling": YARN})
    assert same(read(tmp_path, edited(real_config, spelling)), yarn)
    assert yarn.attention_factor == np.float32(1.138629436111989)
    assert not np.array_equal(yarn.inv_freq, read(tmp_path, real_config).inv_freq)


def test_yarn_defaults_follow_the_context(real_config: dict[str, Any], tmp_path: Path) -> None:
    given = read(tmp_path, real_config | {"rope_scaling": YARN | {"original_max_position_embeddings": 40960}})
    absent = read(tmp_path, real_config | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    assert same(given, absent)
    ratio = read(tmp_path, real_config | {"max_position_embeddings": 65536, "rope_scaling": YARN | {"factor": 2.0}})
    derived = read(tmp_path, real_config | {"max_position_embeddings": 65536, "rope_scaling": YARN | {"factor": None}})
    assert same(ratio, derived)


def test_switches(real_config: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path, edited(real_config, {"norm_topk_prob": ABSENT})).norm_topk_prob is False
    assert read(tmp_path, real_config | {"norm_topk_prob": False}).norm_topk_prob is False
    assert read(tmp_path, real_config | {"attention_bias": True}).attention_bias is True
    assert read(tmp_path, real_config | {"tie_word_embeddings": True}).tied_embeddings is True
    assert read(tmp_path, real_config | {"rms_norm_eps": 1e-5}).eps.tobytes() == np.float32(1e-5).tobytes()


def test_head_dim(real_config: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path, edited(real_config, {"head_dim": ABSENT})).head_dim == 64
    assert read(tmp_path, real_config | {"head_dim": None}).head_dim == 64
    assert read(tmp_path, real_config | {"head_dim": 96}).inv_freq.shape == (48,)
    assert read(tmp_path, edited(dense_config(real_config), {"head_dim": ABSENT})).head_dim == 128


def test_dense_layers(real_config: dict[str, Any], tmp_path: Path) -> None:
    sparse = read(tmp_path, real_config | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [1]})
    assert sparse.dense_layers == (0, 1, 2, 4)
    assert (sparse.dense_hidden, sparse.expert_hidden, sparse.experts) == (6144, 768, 128)
    none = read(tmp_path, edited(real_config, {"num_experts": 0, "num_experts_per_tok": ABSENT}))
    assert none.dense_layers == tuple(range(48))
    assert (none.experts, none.experts_per_token, none.expert_hidden) == (0, 0, 0)


def test_dense_qwen3(real_config: dict[str, Any], tmp_path: Path) -> None:
    config = read(tmp_path, dense_config(real_config))
    assert config.architecture == "Qwen3ForCausalLM"
    assert config.dense_layers == tuple(range(48))
    assert (config.dense_hidden, config.experts, config.norm_topk_prob) == (6144, 0, False)
