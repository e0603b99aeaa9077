"""The architecture of a model, as the maths needs it: one frozen dataclass, validated once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# NUMERICS rule 8: the only widths that an expert chunk may have.
CHUNK_WIDTHS = (128, 96, 64, 32)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def chunk_width(hidden_units: int, group_size: int) -> int:
    """The width of an MLP's chunks, from its hidden units and the weight group alone (NUMERICS rule 8).

    Args:
        hidden_units: `d_ff` of the layer's experts or of its dense MLP.
        group_size: Weights per scale; 0 is a whole row.

    Returns:
        Hidden units per chunk, or 0 if no allowed width fits (the group size cannot be used with this model).
    """
    padded = round_up(hidden_units, 32)
    step = max(32, group_size)
    return next((width for width in CHUNK_WIDTHS if padded % width == 0 and width % step == 0), 0)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one Qwen3 or Qwen3-MoE model.

    Floats that enter the numerics (`eps`, `inv_freq`, `attention_factor`, `score_scale`) are f32 values; the store
    keeps them as bits (NUMERICS rule 3).
    """

    architecture: str  # "Qwen3MoeForCausalLM" or "Qwen3ForCausalLM"
    layers: int
    model_dim: int  # D
    heads: int  # H, query heads
    kv_heads: int  # G
    head_dim: int  # P
    experts: int  # E, 0 for a dense model
    experts_per_token: int  # K
    expert_hidden: int  # F of one expert
    dense_hidden: int  # F of a dense layer's MLP
    dense_layers: tuple[int, ...]  # layers whose MLP is dense
    vocabulary: int  # V, rows of the embedding table
    max_positions: int
    norm_topk_prob: bool
    attention_bias: bool
    tied_embeddings: bool
    eps: np.float32
    score_scale: np.float32  # P^-1/2
    attention_factor: np.float32  # YaRN's factor on cos and sin, 1 without YaRN
    inv_freq: npt.NDArray[np.float32]  # [P / 2]

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def is_dense(self, layer: int) -> bool:
        """Whether the layer's MLP is dense (one expert of weight 1)."""
        return layer in self.dense_layers

    def layer_experts(self, layer: int) -> int:
        """Experts of a layer's MLP; a dense MLP counts as one."""
        return 1 if self.is_dense(layer) else self.experts

    def layer_hidden(self, layer: int) -> int:
        """Hidden units of each of the layer's experts."""
        return self.dense_hidden if self.is_dense(layer) else self.expert_hidden
