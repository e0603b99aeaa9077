"""Small checkpoints written byte by byte, so that the reader meets files that no code of ours laid out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 6,
    "hidden_act": "silu",
    "hidden_size": 10,
    "intermediate_size": 7,
    "max_position_embeddings": 512,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 5,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 11,
}
MOE_KEYS = ("decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts")
DENSE = {key: value for key, value in MOE.items() if key not in (*MOE_KEYS, "num_experts_per_tok")} | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
}
# config.json of Qwen/Qwen3-30B-A3B, as released.
REAL = json.loads(
    """{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06,
    "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false,
    "vocab_size": 151936}"""
)
Tensor = tuple[str, np.ndarray]


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file, with tensors in the given order and a header of any length (so nothing is aligned)."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, (dtype, values) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [position, position + values.nbytes],
        }
        position += values.nbytes
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(values.tobytes() for _, values in tensors.values())


def stored(values: np.ndarray, dtype: str) -> Tensor:
    """f32 values as a tensor of a file; BF16 keeps the upper 16 bits."""
    if dtype == "BF16":
        return dtype, (values.view(np.uint32) >> 16).astype(np.uint16)
    return dtype, values.astype({"F16": np.float16, "F32": np.float32}[dtype])


@dataclass
class Source:
    """A checkpoint to be written: edit `config` and `tensors`, then `write` it."""

    config: dict[str, Any]
    values: dict[str, np.ndarray]  # f32, exact in BF16 and in F16
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def write(self, directory: Path, shards: int = 0) -> Path:
        """Writes config.json and one file, or an index and `shards` files."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        if not shards:
            (directory / "model.safetensors").write_bytes(safetensors_bytes(self.tensors, {"format": "pt"}))
            return directory
        names = list(self.tensors)
        places = {name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(names)}
        for file in set(places.values()):
            part = {name: self.tensors[name] for name in names if places[name] == file}
            (directory / file).write_bytes(safetensors_bytes(part))
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory

    def fuse(self, layers: range) -> None:
        """Turns per-expert tensors into fused ones."""
        for layer in layers:
            prefix = f"model.layers.{layer}.mlp.experts."
            parts: dict[str, list[np.ndarray]] = {"gate_proj": [], "up_proj": [], "down_proj": []}
            for expert in range(self.config["num_experts"]):
                for kind, found in parts.items():
                    dtype, values = self.tensors.pop(f"{prefix}{expert}.{kind}.weight")
                    found.append(values)
            gate_up = [np.concatenate(pair) for pair in zip(parts["gate_proj"], parts["up_proj"], strict=True)]
            self.tensors[prefix + "gate_up_proj"] = (dtype, np.stack(gate_up))
            self.tensors[prefix + "down_proj"] = (dtype, np.stack(parts["down_proj"]))


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's per-expert names and shapes, written out apart from the code under test."""
    model_dim, head_dim, vocabulary = config["hidden_size"], config["head_dim"], config["vocab_size"]
    q_rows, kv_rows = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, model_dim)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{norm}_layernorm.weight": (model_dim,) for norm in ("input", "post_attention")}
        shapes |= {f"{at}self_attn.{norm}_norm.weight": (head_dim,) for norm in "qk"}
        rows = {
            "q": (q_rows, model_dim),
            "k": (kv_rows, model_dim),
            "v": (kv_rows, model_dim),
            "o": (model_dim, q_rows),
        }
        shapes |= {f"{at}self_attn.{name}_proj.weight": shape for name, shape in rows.items()}
        if config["attention_bias"]:
            shapes |= {f"{at}self_attn.{name}_proj.bias": shape[:1] for name, shape in rows.items()}
        listed, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
        moe = "num_experts" in config and layer not in listed and (layer + 1) % step == 0
        hidden = config["moe_intermediate_size"] if moe else config["intermediate_size"]
        for prefix in [f"experts.{expert}." for expert in range(config["num_experts"])] if moe else [""]:
            shapes |= {f"{at}mlp.{prefix}{kind}_proj.weight": (hidden, model_dim) for kind in ("gate", "up")}
            shapes[f"{at}mlp.{prefix}down_proj.weight"] = (model_dim, hidden)
        if moe:
            shapes[f"{at}mlp.gate.weight"] = (config["num_experts"], model_dim)
    shapes["model.norm.weight"] = (model_dim,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, model_dim)
    return shapes


MakeSource = Callable[..., Source]


@pytest.fixture
def make_source() -> MakeSource:
    """Makes a random checkpoint: `make_source(base="moe", dtype="BF16", **changes of the config)`."""

    def make(base: str = "moe", dtype: str = "BF16", **changes: Any) -> Source:
        config = copy.deepcopy(MOE if base == "moe" else DENSE) | changes
        random = np.random.default_rng(7)
        values = {
            name: (random.integers(-128, 128, shape) / 64).astype(np.float32)
            for name, shape in tensor_shapes(config).items()
        }
        return Source(config, values, {name: stored(array, dtype) for name, array in values.items()})

    return make


@pytest.fixture
def golden() -> Path:
    """The directory of the goldens."""
    return Path(__file__).parent.parent / "golden"


@pytest.fixture
def real_config() -> dict[str, Any]:
    """config.json of Qwen3-30B-A3B."""
    return copy.deepcopy(REAL)
