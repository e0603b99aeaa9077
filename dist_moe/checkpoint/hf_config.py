"""A Hugging Face config.json as a ModelConfig: every spelling of the released Qwen3 models, and nothing else.

Rules and defaults are those of transformers 5.23.0 (Qwen3MoeConfig, Qwen3Config). A default stands in only where
released configs leave a key out; any other missing key is refused, because transformers would guess silently.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dist_moe import files
from dist_moe.checkpoint.fields import LARGEST_HEAD_DIM, MOST_EXPERTS, MOST_LAYERS, Fields, read_json
from dist_moe.checkpoint.hf_rope import rope_settings
from dist_moe.checkpoint.rope import rope_frequencies
from dist_moe.errors import CheckpointError
from dist_moe.model_config import ModelConfig

ARCHITECTURES = {"qwen3_moe": "Qwen3MoeForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Qwen3Config declares it; Qwen3MoeConfig does not and falls back to hidden_size / num_attention_heads.
DENSE_HEAD_DIM = 128
DTYPES = ("bfloat16", "float16", "float32")


def read_hf_config(directory: Path) -> ModelConfig:
    """The model that a directory's config.json describes.

    `tied_embeddings` is the config's word; whether lm_head really equals the embedding only the tensors can tell.

    Raises:
        CheckpointError: If the file is missing or damaged, a value is missing or out of range, or the model is not a
            Qwen3 or Qwen3-MoE that dist-moe runs.
    """
    path = directory / "config.json"
    if not files.is_file(path):
        if gguf := sorted(directory.glob("*.gguf")):
            raise CheckpointError(f"{directory}: has no config.json, but {gguf[0].name}; give that file: {gguf[0]}")
        raise CheckpointError(
            f"{directory}: expected a Hugging Face model directory, but it has no config.json;"
            " give the directory that holds config.json and model.safetensors"
        )
    fields = Fields(str(path), read_json(path))
    architecture = read_architecture(fields)
    refuse_unsupported(fields)
    return model_config(fields, architecture)


def read_architecture(fields: Fields) -> str:
    """The supported architecture that model_type and architectures agree on."""
    known = " or ".join(f'"{name}"' for name in ARCHITECTURES)
    action = f"dist-moe runs {' and '.join(ARCHITECTURES.values())}"
    model_type = fields.values.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise fields.refusal("model_type", known, action)
    architecture = ARCHITECTURES[model_type]
    if fields.has("architectures") and fields.values["architectures"] != [architecture]:
        raise fields.refusal("architectures", f'["{architecture}"] with model_type "{model_type}"', action)
    return architecture


def refuse_unsupported(fields: Fields) -> None:
    """Raises for every feature of these model classes that would change the result and that dist-moe lacks."""
    if fields.has("quantization_config"):
        action = "download the bf16 release of the model and let dist-moe quantize it"
        raise fields.refusal("quantization_config", "none", action)
    if fields.values.get("hidden_act") != "silu":
        raise fields.refusal("hidden_act", '"silu"', "dist-moe has no other activation")
    if fields.flag("use_sliding_window", default=False):
        raise fields.refusal("use_sliding_window", "false", "dist-moe has no sliding-window attention")
    layer_types = fields.values.get("layer_types")
    full = ["full_attention"] * fields.count("num_hidden_layers", MOST_LAYERS)
    if layer_types is not None and layer_types != full:
        action = "dist-moe has no sliding-window or linear attention"
        raise fields.refusal("layer_types", f'"full_attention" for each of {len(full)} layers', action)
    for key in ("dtype", "torch_dtype"):
        if fields.has(key) and fields.values[key] not in DTYPES:
            raise fields.refusal(key, " or ".join(f'"{name}"' for name in DTYPES), "use the bf16 release of the model")


def model_config(fields: Fields, architecture: str) -> ModelConfig:
    """The checked sizes and constants."""
    layers, model_dim = fields.count("num_hidden_layers", MOST_LAYERS), fields.integer("hidden_size")
    heads, kv_heads = fields.integer("num_attention_heads"), fields.integer("num_key_value_heads")
    if heads % kv_heads:
        raise fields.refusal("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    head_dim = read_head_dim(fields, architecture, model_dim, heads)
    max_positions = fields.integer("max_position_embeddings")
    inv_freq, factor = rope_frequencies(rope_settings(fields, head_dim, max_positions))
    dense_layers = read_dense_layers(fields, architecture, layers)
    experts, experts_per_token, expert_hidden = 0, 0, 0
    if len(dense_layers) < layers:
        experts, experts_per_token = read_experts(fields), fields.integer("num_experts_per_tok")
        expert_hidden = fields.integer("moe_intermediate_size")
        if experts_per_token > experts:
            raise fields.refusal("num_experts_per_tok", f"at most num_experts = {experts}")
    return ModelConfig(
        architecture=architecture,
        layers=layers,
        model_dim=model_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        experts=experts,
        experts_per_token=experts_per_token,
        expert_hidden=expert_hidden,
        dense_hidden=fields.integer("intermediate_size") if dense_layers else 0,
        dense_layers=dense_layers,
        vocabulary=fields.integer("vocab_size"),
        max_positions=max_positions,
        norm_topk_prob=fields.flag("norm_topk_prob", default=False),
        attention_bias=fields.flag("attention_bias", default=False),
        tied_embeddings=fields.flag("tie_word_embeddings", default=False),
        eps=np.float32(fields.number("rms_norm_eps")),
        score_scale=np.float32(head_dim**-0.5),
        attention_factor=factor,
        inv_freq=inv_freq,
    )


def read_head_dim(fields: Fields, architecture: str, model_dim: int, heads: int) -> int:
    """The head dimension: its key, or the default of the model's config class."""
    if fields.has("head_dim"):
        head_dim = fields.count("head_dim", LARGEST_HEAD_DIM, minimum=2)
    elif architecture == ARCHITECTURES["qwen3"]:
        head_dim = DENSE_HEAD_DIM
    elif model_dim % heads:
        raise fields.refusal("head_dim", f"a whole number, as hidden_size {model_dim} / {heads} heads is none")
    else:
        head_dim = model_dim // heads
    if head_dim % 2:
        expected = "an even number" if fields.has("head_dim") else f"an even number, not {model_dim} / {heads}"
        raise fields.refusal("head_dim", expected, "rotary embeddings turn pairs of dimensions")
    return head_dim


def read_experts(fields: Fields) -> int:
    """The number of experts per layer, under either of its names."""
    names = [key for key in ("num_experts", "num_local_experts") if fields.has(key)] or ["num_experts"]
    counts = [fields.count(key, MOST_EXPERTS, minimum=0) for key in names]
    if len(set(counts)) > 1:
        raise fields.refusal("num_local_experts", f"the same as num_experts = {counts[0]}")
    return counts[0]


def read_dense_layers(fields: Fields, architecture: str, layers: int) -> tuple[int, ...]:
    """The layers whose MLP is dense (Qwen3MoeDecoderLayer's rule; all of a Qwen3ForCausalLM)."""
    if architecture == ARCHITECTURES["qwen3"] or read_experts(fields) == 0:
        return tuple(range(layers))
    listed = fields.indices("mlp_only_layers", layers)
    step = fields.integer("decoder_sparse_step", default=1)
    return tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step)
