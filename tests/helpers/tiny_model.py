"""Tiny random checkpoints, made from integers alone so that every machine and NumPy makes the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TinyModel:
    """The sizes of a checkpoint; layer `dense_layers` have an MLP instead of experts."""

    layers: int = 2
    model_dim: int = 64
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 8
    experts_per_token: int = 3
    expert_hidden: int = 192
    dense_hidden: int = 160
    dense_layers: tuple[int, ...] = (1,)
    vocabulary: int = 300
    tied: bool = False
    bias: bool = False
    seed: int = 1

    def config_json(self) -> dict[str, object]:
        """config.json in the old spelling."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": self.bias,
            "hidden_act": "silu",
            "hidden_size": self.model_dim,
            "intermediate_size": self.dense_hidden,
            "moe_intermediate_size": self.expert_hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(self.dense_layers),
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_scaling": None,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "float32",
            "use_sliding_window": False,
            "vocab_size": self.vocabulary,
        }

    def tensors(self) -> dict[str, Floats]:
        """All weights, f32, under their Hugging Face names."""
        bits = np.random.PCG64(self.seed)
        model_dim, rows = self.model_dim, self.heads * self.head_dim
        tensors = {"model.embed_tokens.weight": _matrix(bits, self.vocabulary, model_dim, 1.0)}
        tensors["model.norm.weight"] = _gain(bits, model_dim)
        if not self.tied:
            tensors["lm_head.weight"] = _matrix(bits, self.vocabulary, model_dim, 0.3)
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            attention = name + "self_attn."
            tensors[name + "input_layernorm.weight"] = _gain(bits, model_dim)
            tensors[name + "post_attention_layernorm.weight"] = _gain(bits, model_dim)
            tensors[attention + "q_norm.weight"] = _gain(bits, self.head_dim)
            tensors[attention + "k_norm.weight"] = _gain(bits, self.head_dim)
            tensors[attention + "q_proj.weight"] = _matrix(bits, rows, model_dim, 0.3)
            for key in "kv":
                columns = self.kv_heads * self.head_dim
                tensors[attention + f"{key}_proj.weight"] = _matrix(bits, columns, model_dim, 0.3)
            tensors[attention + "o_proj.weight"] = _matrix(bits, model_dim, rows, 0.3)
            if self.bias:
                for key, length in (("q", rows), ("k", columns), ("v", columns), ("o", model_dim)):
                    tensors[attention + f"{key}_proj.bias"] = _matrix(bits, 1, length, 0.2)[0]
            tensors |= self._mlp(bits, layer, name + "mlp.")
        return tensors

    def _mlp(self, bits: np.random.PCG64, layer: int, name: str) -> dict[str, Floats]:
        if layer in self.dense_layers:
            return _expert(bits, name, self.model_dim, self.dense_hidden)
        tensors = {name + "gate.weight": _matrix(bits, self.experts, self.model_dim, 0.5)}
        for expert in range(self.experts):
            tensors |= _expert(bits, f"{name}experts.{expert}.", self.model_dim, self.expert_hidden)
        return tensors

    def write(self, directory: Path, tensors: Mapping[str, Floats] | None = None, **changes: object) -> Path:
        """Write a checkpoint directory (no tokenizer); `changes` override fields, `tensors` its own weights.

        Returns:
            The directory.
        """
        model = replace(self, **changes)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(model.config_json(), indent=1))
        save_file(dict(tensors or model.tensors()), directory / "model.safetensors", metadata={"format": "pt"})
        return directory


def random_ids(count: int, vocabulary: int, seed: int = 7) -> tuple[int, ...]:
    """Token ids in [0, vocabulary), the same everywhere."""
    return tuple(int(word % vocabulary) for word in np.random.PCG64(seed).random_raw(count))


def _expert(bits: np.random.PCG64, name: str, model_dim: int, hidden: int) -> dict[str, Floats]:
    return {
        name + "gate_proj.weight": _matrix(bits, hidden, model_dim, 0.3),
        name + "up_proj.weight": _matrix(bits, hidden, model_dim, 0.3),
        name + "down_proj.weight": _matrix(bits, model_dim, hidden, 0.3),
    }


def _matrix(bits: np.random.PCG64, rows: int, columns: int, scale: float) -> Floats:
    """Uniform in [-scale, scale) on a grid of 2^-12: the same floats on every machine."""
    words = bits.random_raw(rows * columns) >> np.uint64(51)
    grid = words.astype(np.float32) / np.float32(4096) - np.float32(1)
    return (grid * np.float32(scale)).reshape(rows, columns)


def _gain(bits: np.random.PCG64, length: int) -> Floats:
    return np.float32(1) + _matrix(bits, 1, length, 0.25)[0]
