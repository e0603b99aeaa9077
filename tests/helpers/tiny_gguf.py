"""Tiny random models as GGUF files, written with the gguf package."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from helpers.tiny_model import TinyModel

MOE = TinyModel(layers=2, dense_layers=())
DENSE = TinyModel(layers=2, dense_layers=(0, 1), tied=True)
# Rows of 256 weights and more, as K-quants need them.
WIDE = TinyModel(layers=1, dense_layers=(), model_dim=256, experts=3, experts_per_token=2, expert_hidden=512)
# Where the f16 scales lie in a block of the types that the package cannot write.
SCALE_BYTES = {
    "Q2_K": (80, 84),
    "Q3_K": (108, 110),
    "Q4_K": (0, 4),
    "Q5_K": (0, 4),
    "Q6_K": (208, 210),
    "IQ4_NL": (0, 2),
    "IQ4_XS": (0, 2),
    "IQ2_XXS": (0, 2),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FLOATS = {"F32": np.float32, "F16": np.float16}


def gguf_tensors(model: TinyModel) -> dict[str, np.ndarray]:
    """The model's weights under GGUF's names, the experts of a layer in one tensor."""
    found: dict[str, Any] = {}
    for name, values in model.tensors().items():
        name = name.removesuffix(".weight")
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        prefix, rest = (f"blk.{layer[1]}.", layer[2]) if layer else ("", name)
        expert = re.match(r"mlp\.experts\.\d+\.(\w+)_proj", rest)
        if expert:
            found.setdefault(f"{prefix}ffn_{expert[1]}_exps.weight", []).append(values)
        else:
            found[prefix + NAMES[rest] + ".weight"] = values
    return {name: np.stack(values) if isinstance(values, list) else values for name, values in found.items()}


def metadata(model: TinyModel) -> dict[str, Any]:
    """The keys that describe the architecture, without its prefix."""
    keys: dict[str, Any] = {
        "block_count": model.layers,
        "context_length": 4096,
        "embedding_length": model.model_dim,
        "feed_forward_length": model.dense_hidden,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.kv_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1000000.0,
    }
    if not model.dense_layers:
        keys |= {
            "expert_count": model.experts,
            "expert_used_count": model.experts_per_token,
            "expert_feed_forward_length": model.expert_hidden,
        }
    return keys


def encoded(values: np.ndarray, type_name: str) -> np.ndarray:
    """Values as a tensor's data: floats as they are, other types as bytes."""
    if type_name in FLOATS:
        return values.astype(FLOATS[type_name])
    if type_name in SCALE_BYTES:
        return random_blocks(values.shape, type_name)
    return quantize(values, GGMLQuantizationType[type_name])


def random_blocks(shape: tuple[int, ...], type_name: str, seed: int = 1) -> np.ndarray:
    """Random integers under small random scales: the data of a tensor of this shape."""
    weights, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    random, (first, stop) = np.random.default_rng(seed), SCALE_BYTES[type_name]
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // weights, block_bytes)).astype(np.uint8)
    scales = random.uniform(-1e-3, 1e-3, (*blocks.shape[:-1], (stop - first) // 2)).astype(np.float16)
    blocks[..., first:stop] = scales.view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write_gguf(
    path: Path,
    model: TinyModel = MOE,
    matrices: str = "Q4_0",
    types: Mapping[str, str] | None = None,
    changes: Mapping[str, Any] | None = None,
    data: Mapping[str, np.ndarray] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    tensors_per_file: int = 0,
) -> dict[str, np.ndarray]:
    """Write a model.

    Args:
        path: The file.
        model: Its sizes and weights.
        matrices: The type of all matrices but the routers, which are F32 like the norms.
        types: Other types, by GGUF name.
        changes: Other metadata, without the architecture's prefix if they begin with a dot; None leaves a key out.
        data: Other data, by GGUF name: bytes of the tensor's type.
        tokenizer: Keys of the tokenizer, as `tokenizer_keys` gives them.
        tensors_per_file: Split the model into m-00001-of-0000N.gguf and so on; 0 writes one file.

    Returns:
        The float32 values that the tensors stand for.
    """
    architecture = "qwen3" if model.dense_layers else "qwen3moe"
    writer = GGUFWriter(path, architecture, split_max_tensors=tensors_per_file)
    keys = {f".{key}": value for key, value in metadata(model).items()} | dict(changes or {}) | dict(tokenizer or {})
    for key, value in keys.items():
        add_value(writer, architecture + key if key.startswith(".") else key, value)
    values = {}
    for name, weights in gguf_tensors(model).items():
        default = "F32" if weights.ndim == 1 or "ffn_gate_inp" in name else matrices
        type_name = (types or {}).get(name, default)
        raw = (data or {}).get(name, encoded(weights, type_name))
        writer.add_tensor(name, raw, raw_dtype=None if type_name in FLOATS else GGMLQuantizationType[type_name])
        values[name] = np.array(dequantize(raw, GGMLQuantizationType[type_name]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add one key in the type that llama.cpp expects; None adds nothing."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def tokenizer_keys(directory: Path, vocabulary: int) -> dict[str, Any]:
    """A Hugging Face tokenizer as llama.cpp's converter writes it, padded to the vocabulary with unused tokens."""
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    texts = [f"[PAD{token}]" for token in range(vocabulary)]
    kinds = [5] * vocabulary
    for text, token in content["model"]["vocab"].items():
        texts[token], kinds[token] = text, 1
    for token in content["added_tokens"]:
        looks_special = token["special"] or token["content"].startswith("<|")
        texts[token["id"]], kinds[token["id"]] = token["content"], 3 if looks_special else 4
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": texts.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": texts.index("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": False,
    }
