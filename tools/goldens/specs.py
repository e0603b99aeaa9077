"""The tiny random models: which switches each one turns.

Sizes are awkward on purpose (no powers of two, odd counts, padding inside a group of 32), and every value of every
switch is in at least one model. README.md in tests/golden shows the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spec:
    """One tiny model: its config fields and how its directory is written.

    `old` is None for the spelling that transformers 5 writes; a dict asks for that of transformers 4 (rope_theta,
    rope_scaling, num_experts, torch_dtype) and holds further edits of config.json, where None removes a key
    (but sets mlp_only_layers to null).
    """

    name: str
    dtype: str
    config: dict[str, Any]
    fused: bool = False
    shard_size: str | None = None
    old: dict[str, Any] | None = None
    tokens: int = 80
    dense: bool = False
    rope_type_key: str = "rope_type"

    @property
    def old_spelling(self) -> bool:
        """Whether config.json is rewritten as transformers 4 wrote it."""
        return self.old is not None


def shape(hidden: int, heads: str, layers: int, vocab: int, experts: str = "", d_ff: int = 64) -> dict[str, Any]:
    """Config fields of the sizes.

    `heads` is "query/kv x head_dim"; `experts` is "count/top_k x d_ff", empty for a model without experts; `d_ff` is
    that of dense layers.
    """
    counts, head_dim = heads.split("x")
    query, kv = counts.split("/")
    fields: dict[str, Any] = {
        "hidden_size": hidden,
        "num_attention_heads": int(query),
        "num_key_value_heads": int(kv),
        "head_dim": int(head_dim),
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "intermediate_size": d_ff,
        "max_position_embeddings": 512,
    }
    if experts:
        counts, expert_d_ff = experts.split("x")
        count, top_k = counts.split("/")
        fields |= {"num_experts": int(count), "num_experts_per_tok": int(top_k)}
        fields["moe_intermediate_size"] = int(expert_d_ff)
    return fields


def rope(theta: float, **yarn: Any) -> dict[str, Any]:
    """Rope parameters in the new spelling; any further key makes them YaRN's."""
    return {"rope_parameters": {"rope_type": "yarn" if yarn else "default", "rope_theta": theta, **yarn}}


NORM = {"norm_topk_prob": True}
RAW = {"norm_topk_prob": False}
TIED = {"tie_word_embeddings": True}
BIAS = {"attention_bias": True}
YARN_30B = {"max_position_embeddings": 131072} | rope(1e6, factor=4.0, original_max_position_embeddings=32768)
YARN_SHORT = rope(1e4, factor=4.0, original_max_position_embeddings=128)
WINDOW_OFF = {"sliding_window": 4096, "max_window_layers": 1}  # beside use_sliding_window: false

SPECS: tuple[Spec, ...] = (
    Spec("base", "bfloat16", shape(64, "4/2x32", 2, 131, "5/2x32") | NORM | rope(1e6)),
    Spec(
        "fused_f32",
        "float32",
        shape(48, "4/1x16", 2, 97, "4/2x40") | RAW | TIED | rope(1e4) | {"rms_norm_eps": 1e-3},
        fused=True,
        shard_size="60KB",
        tokens=64,
    ),
    Spec(
        "old_f16_bias",
        "float16",
        shape(80, "5/1x16", 2, 97, "4/3x40") | NORM | BIAS | rope(1e6),
        old={"head_dim": None, "mlp_only_layers": None} | WINDOW_OFF,
        tokens=65,
    ),
    Spec(
        "old_yarn_type",
        "bfloat16",
        shape(48, "4/2x32", 3, 97, "4/2x64", 96) | RAW | YARN_30B | {"decoder_sparse_step": 2},
        shard_size="90KB",
        old={},
        rope_type_key="type",
    ),
    Spec(
        "yarn_mlp_only",
        "bfloat16",
        shape(48, "4/1x48", 2, 131, "7/3x40", 160) | NORM | BIAS | TIED | YARN_SHORT | {"mlp_only_layers": [0]},
        fused=True,
        tokens=130,
    ),
    Spec(
        "old_chunks",
        "float16",
        shape(32, "4/4x32", 2, 97, "4/2x160", 192) | RAW | rope(1e4) | {"decoder_sparse_step": 2},
        fused=True,
        old={"norm_topk_prob": None},
    ),
    Spec(
        "old_vocab300",
        "bfloat16",
        shape(32, "4/2x32", 2, 300, "4/2x96") | NORM | rope(1e7),
        shard_size="60KB",
        old={},
    ),
    Spec("six_heads_e8", "bfloat16", shape(80, "6/3x16", 2, 97, "8/3x16") | NORM | TIED | rope(1e4)),
    Spec("dense_tied", "bfloat16", shape(64, "4/2x32", 2, 300, d_ff=160) | TIED | rope(1e6), dense=True),
    Spec(
        "dense_old_f32",
        "float32",
        shape(48, "6/2x16", 2, 97, d_ff=64) | BIAS | rope(1e6),
        shard_size="60KB",
        old=WINDOW_OFF,
        dense=True,
    ),
)
