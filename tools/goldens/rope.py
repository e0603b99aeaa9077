"""Goldens of the rotary embedding: rope.npz (rotated vectors) and yarn_full.npz (the real models' frequencies).

T positions, P head dim, H query heads, G kv heads.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding, apply_rotary_pos_emb

from goldens.build import seed_of

POSITIONS = (0, 1, 2, 63, 64, 127, 128, 499, 4095, 32767, 40959)
REAL = {  # the fields of Qwen3-30B-A3B's config.json that decide its frequencies
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def changed(scaling: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """The real config with other fields, and with YaRN where `scaling` (keys beside the usual ones) is given."""
    return REAL | fields | ({} if scaling is None else {"rope_scaling": YARN | scaling})


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    """A config whose rope_scaling lacks a key."""
    return config | {"rope_scaling": {k: v for k, v in config["rope_scaling"].items() if k != key}}


CASES: dict[str, dict[str, Any]] = {
    "default": changed(),
    "theta_1e7": changed(rope_theta=10000000, max_position_embeddings=262144),
    "theta_missing": {k: v for k, v in REAL.items() if k != "rope_theta"},
    "head_dim_missing": {k: v for k, v in REAL.items() if k != "head_dim"},
    "yarn": changed({}, max_position_embeddings=131072),
    "yarn_theta_1e7": changed({"factor": 4, "original_max_position_embeddings": 262144}, rope_theta=10000000),
    "yarn_type_alias": without(changed({"type": "yarn"}), "rope_type"),
    "yarn_no_original": without(changed({}), "original_max_position_embeddings"),
    "yarn_no_truncate": changed({"truncate": False}),
    "yarn_given_factor": changed({"attention_factor": 1.25}),
    "yarn_mscale": changed({"mscale": 1.0, "mscale_all_dim": 0.8}),
    "yarn_mscale_equal": changed({"mscale": 1.0, "mscale_all_dim": 1.0}),
    "yarn_mscale_alone": changed({"mscale": 0.7}),
    "yarn_mscale_zero": changed({"mscale": 1.0, "mscale_all_dim": 0}),
    "yarn_betas": changed({"beta_fast": 16, "beta_slow": 2.5}),
    "yarn_betas_zero": changed({"beta_fast": 0, "beta_slow": 0}),
    "yarn_factor_1": changed({"factor": 1.0}),
    "yarn_factor_2_5": changed({"factor": 2.5}),
    "yarn_short_original": changed({"original_max_position_embeddings": 16}, head_dim=16),
    "yarn_head_dim_48": changed({"original_max_position_embeddings": 128}, head_dim=48, rope_theta=10000.0),
    "new_default": {k: v for k, v in REAL.items() if not k.startswith("rope_")}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0}},
    "new_yarn": {k: v for k, v in REAL.items() if not k.startswith("rope_")}
    | {"rope_parameters": YARN | {"rope_theta": 1000000.0}},
    "scaling_beats_parameters": changed({}) | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0}},
}


def frequencies(case: dict[str, Any]) -> tuple[np.ndarray, np.float64]:
    """inv_freq (f32 bits) and attention factor of a config, from transformers' rotary module."""
    config = Qwen3MoeConfig(**copy.deepcopy(case))
    module = Qwen3MoeRotaryEmbedding(config)
    if module.rope_type != "default":
        inv_freq, factor = ROPE_INIT_FUNCTIONS[module.rope_type](config)
        assert torch.equal(inv_freq, module.inv_freq)
        assert factor == module.attention_scaling
    return module.inv_freq.numpy(), np.float64(module.attention_scaling)


def rotated(prefix: str, parameters: dict[str, Any], head_dim: int) -> dict[str, np.ndarray]:
    """cos, sin and rotated q and k of one rope setting, at POSITIONS."""
    heads = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": head_dim}
    config = Qwen3MoeConfig(**heads, max_position_embeddings=40960, rope_parameters=dict(parameters))
    module = Qwen3MoeRotaryEmbedding(config)
    generator = torch.Generator().manual_seed(seed_of("rope " + prefix))
    q_THP = torch.randn(len(POSITIONS), 3, head_dim, generator=generator)
    k_TGP = torch.randn(len(POSITIONS), 1, head_dim, generator=generator)
    cos, sin = module(q_THP, torch.tensor(POSITIONS)[None])
    q_rot, k_rot = apply_rotary_pos_emb(q_THP[None], k_TGP[None], cos, sin, unsqueeze_dim=2)
    arrays = {
        "inv_freq": module.inv_freq,
        "attention_factor": torch.tensor(module.attention_scaling, dtype=torch.float64),
        "cos_TP": cos[0],
        "sin_TP": sin[0],
        "q_THP": q_THP,
        "k_TGP": k_TGP,
        "q_rot_THP": q_rot[0],
        "k_rot_TGP": k_rot[0],
    }
    return {f"{prefix}_{key}": value.numpy() for key, value in arrays.items()}


def write_rope(golden: Path) -> None:
    """Writes rope.npz and yarn_full.npz."""
    plain = {"rope_type": "default", "rope_theta": 1000000.0}
    yarn = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 4096}
    arrays = rotated("default", plain, 32) | rotated("yarn", yarn, 48)
    settings = json.dumps({"default": plain, "yarn": yarn})
    np.savez_compressed(golden / "rope.npz", settings=settings, positions_T=np.array(POSITIONS, np.int32), **arrays)
    full: dict[str, Any] = {"cases": json.dumps(CASES)}
    for name, case in CASES.items():
        full[f"{name}_inv_freq"], full[f"{name}_attention_factor"] = frequencies(case)
    np.savez_compressed(golden / "yarn_full.npz", **full)
