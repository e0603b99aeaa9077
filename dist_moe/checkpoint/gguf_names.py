"""GGUF's tensor names and shapes, and where each of our logical matrices lies in them (no rows are permuted in Qwen3).

D model dim, H query heads, G kv heads, P head dim, E experts, F expert hidden units, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from pathlib import Path

from dist_moe.checkpoint.names import Location
from dist_moe.model_config import ModelConfig

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # one of the files of a split model
EMBEDDING, LM_HEAD = "token_embd.weight", "output.weight"
EXPERTS = "ffn_gate_exps.weight"


def gguf_locations(config: ModelConfig, present: Container[str]) -> dict[str, Location]:
    """Every logical name with its place.

    Args:
        config: The model; all of its layers have experts, or none.
        present: The file's tensor names: without output.weight the embedding is lm_head, too.
    """
    table = (config.vocabulary, config.model_dim)
    found = {"embedding": Location(EMBEDDING, table)}
    for layer in range(config.layers):
        prefix, source = f"layers.{layer}.", f"blk.{layer}."
        found.update((prefix + name, place) for name, place in attention(config, source))
        found.update((prefix + name, place) for name, place in mlp(config, layer, source))
    found["final_norm"] = Location("output_norm.weight", (config.model_dim,))
    found["lm_head"] = Location(LM_HEAD, table) if LM_HEAD in present else found["embedding"]
    return found


def attention(config: ModelConfig, source: str) -> Iterator[tuple[str, Location]]:
    """A layer's norms and projections."""
    model_dim, head_dim = config.model_dim, config.head_dim
    q_rows, kv_rows = config.heads * head_dim, config.kv_heads * head_dim
    yield "attention_norm", Location(f"{source}attn_norm.weight", (model_dim,))
    yield "mlp_norm", Location(f"{source}ffn_norm.weight", (model_dim,))
    yield "q_norm", Location(f"{source}attn_q_norm.weight", (head_dim,))
    yield "k_norm", Location(f"{source}attn_k_norm.weight", (head_dim,))
    yield "q", Location(f"{source}attn_q.weight", (q_rows, model_dim))
    yield "k", Location(f"{source}attn_k.weight", (kv_rows, model_dim))
    yield "v", Location(f"{source}attn_v.weight", (kv_rows, model_dim))
    yield "o", Location(f"{source}attn_output.weight", (model_dim, q_rows))


def mlp(config: ModelConfig, layer: int, source: str) -> Iterator[tuple[str, Location]]:
    """A layer's router and experts; a dense MLP is expert 0 and has no router."""
    model_dim, hidden, experts = config.model_dim, config.layer_hidden(layer), config.layer_experts(layer)
    shapes = {"gate": (hidden, model_dim), "up": (hidden, model_dim), "down": (model_dim, hidden)}
    if config.is_dense(layer):
        for name, shape in shapes.items():
            yield f"experts.0.{name}", Location(f"{source}ffn_{name}.weight", shape)
        return
    yield "router", Location(f"{source}ffn_gate_inp.weight", (experts, model_dim))
    for expert in range(experts):
        for name, shape in shapes.items():
            yield f"experts.{expert}.{name}", Location(f"{source}ffn_{name}_exps.weight", (experts, *shape), expert)


def model_name(path: Path) -> str:
    """What a model is called after its file: the file's name without its ending and without its place among several."""
    part = PART.fullmatch(path.name)
    return part[1] if part else path.stem
