"""A GGUF file's metadata as a ModelConfig: architectures qwen3 and qwen3moe as llama.cpp runs them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dist_moe.checkpoint.fields import LARGEST_HEAD_DIM, MOST_EXPERTS, MOST_LAYERS, Fields
from dist_moe.checkpoint.hf_config import ARCHITECTURES
from dist_moe.checkpoint.rope import RopeSettings, Yarn, rope_frequencies
from dist_moe.model_config import ModelConfig

ARCHITECTURE = "general.architecture"
GGUF_ARCHITECTURES = {"qwen3moe": ARCHITECTURES["qwen3_moe"], "qwen3": ARCHITECTURES["qwen3"]}
# What these keys may say without changing the result; others would need features that dist-moe lacks.
NEUTRAL = {
    "attention.sliding_window": 0,
    "expert_shared_count": 0,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.0,
    "leading_dense_block_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.1,
}


def gguf_config(where: str, metadata: Mapping[str, object], vocabulary: int, tied_embeddings: bool) -> ModelConfig:
    """The model that a file's metadata describes.

    Args:
        where: The file, for errors.
        metadata: Its keys and values.
        vocabulary: Rows of the embedding table, which the metadata need not tell.
        tied_embeddings: Whether the file has no lm_head of its own.

    Raises:
        CheckpointError: A value is missing or out of range, or the model is none that dist-moe runs.
    """
    architecture = metadata.get(ARCHITECTURE)
    if not isinstance(architecture, str) or architecture not in GGUF_ARCHITECTURES:
        known = " or ".join(f'"{name}"' for name in GGUF_ARCHITECTURES)
        action = f"dist-moe runs {' and '.join(GGUF_ARCHITECTURES.values())}"
        raise Fields(where, metadata).refusal(ARCHITECTURE, known, action)
    prefix = architecture + "."
    own = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    fields = Fields(f"{where}: metadata of {architecture}", own)
    refuse_unsupported(fields)
    layers, heads = fields.count("block_count", MOST_LAYERS), fields.integer("attention.head_count")
    kv_heads = fields.integer("attention.head_count_kv", default=heads)
    if heads % kv_heads:
        raise fields.refusal("attention.head_count_kv", f"a divisor of attention.head_count = {heads}")
    head_dim, max_positions = read_head_dim(fields), fields.integer("context_length")
    inv_freq, factor = rope_frequencies(rope_settings(fields, head_dim))
    is_dense = architecture == "qwen3"
    experts, experts_per_token, expert_hidden = 0, 0, 0
    if not is_dense:
        experts, experts_per_token = (
            fields.count("expert_count", MOST_EXPERTS),
            fields.integer("expert_used_count"),
        )
        expert_hidden = fields.integer("expert_feed_forward_length")
        if experts_per_token > experts:
            raise fields.refusal("expert_used_count", f"at most expert_count = {experts}")
    return ModelConfig(
        architecture=GGUF_ARCHITECTURES[architecture],
        layers=layers,
        model_dim=fields.integer("embedding_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        experts=experts,
        experts_per_token=experts_per_token,
        expert_hidden=expert_hidden,
        dense_hidden=fields.integer("feed_forward_length") if is_dense else 0,
        dense_layers=tuple(range(layers)) if is_dense else (),
        vocabulary=vocabulary,
        max_positions=max_positions,
        norm_topk_prob=True,
        attention_bias=False,
        tied_embeddings=tied_embeddings,
        eps=np.float32(fields.number("attention.layer_norm_rms_epsilon")),
        score_scale=np.float32(head_dim**-0.5),
        attention_factor=factor,
        inv_freq=inv_freq,
    )


def refuse_unsupported(fields: Fields) -> None:
    """Raise CheckpointError for what would change the result."""
    for key, neutral in NEUTRAL.items():
        value = fields.values.get(key, neutral)
        if not isinstance(value, (int, float)) or abs(value - neutral) > 1e-6:
            raise fields.refusal(key, f"{neutral}", "dist-moe runs Qwen3 as its makers published it")


def read_head_dim(fields: Fields) -> int:
    """The head dimension, the same for keys, values and rotation."""
    head_dim = fields.count("attention.key_length", LARGEST_HEAD_DIM, minimum=2)
    if head_dim % 2:
        raise fields.refusal("attention.key_length", "an even number", "rotary embeddings turn pairs of dimensions")
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, default=head_dim) != head_dim:
            raise fields.refusal(key, f"{head_dim}, as attention.key_length", "dist-moe has one head dimension")
    return head_dim


def rope_settings(fields: Fields, head_dim: int) -> RopeSettings:
    """The rotary settings: plain, or YaRN with transformers' betas unless the file has others."""
    theta, kind = fields.number("rope.freq_base", above=1), fields.values.get("rope.scaling.type", "none")
    if kind == "none":
        return RopeSettings(head_dim, theta)
    if kind != "yarn":
        raise fields.refusal("rope.scaling.type", '"none" or "yarn"', "dist-moe runs these alone")
    yarn = Yarn(
        factor=fields.number("rope.scaling.factor"),
        original_max_position_embeddings=fields.integer("rope.scaling.original_context_length"),
        beta_fast=fields.optional_number("rope.scaling.yarn_beta_fast") or 32.0,
        beta_slow=fields.optional_number("rope.scaling.yarn_beta_slow") or 1.0,
    )
    return RopeSettings(head_dim, theta, yarn)
