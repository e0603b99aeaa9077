"""Hugging Face's tensor names and shapes, and where each of our logical matrices lies in them.

D model dim, H query heads, G kv heads, P head dim, E experts, F expert hidden units, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass

from dist_moe.errors import CheckpointError
from dist_moe.model_config import ModelConfig

SPARE = 1000  # layers that a description may have more than tensors, before it is called nonsense
GATE_UP = "mlp.experts.gate_up_proj"


@dataclass(frozen=True)
class Location:
    """One logical matrix or vector inside a tensor of the checkpoint."""

    tensor: str
    tensor_shape: tuple[int, ...]
    expert: int | None = None  # index into the first axis of a fused tensor
    first_row: int = 0
    rows: int | None = None  # None: all rows of the tensor


def require_counts(where: object, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], fused: str) -> None:
    """Raise CheckpointError if a model has far more layers or experts than tensors; what else is wrong is seen later.

    Without it, a damaged count makes `locations` list millions of matrices that no file has.

    Args:
        where: The checkpoint, for errors.
        config: What it says of itself.
        shapes: Of the tensors that it has.
        fused: How the name of a tensor with all of a layer's experts ends.
    """
    matrices = 3 * sum(config.layer_experts(layer) for layer in range(config.layers))
    stacked = next((shape for name, shape in shapes.items() if name.endswith(fused)), None)
    if stacked is not None and stacked[0] == config.experts:
        matrices = 0
    if config.layers > SPARE + len(shapes) or matrices > SPARE * 16 + 16 * len(shapes):
        raise CheckpointError(
            f"{where}: is said to have {config.layers} layers of {config.experts} experts, but has "
            f"{len(shapes)} tensors alone; check that config and weights belong to the same model, and copy or "
            "download both again"
        )


def locations(config: ModelConfig, present: Container[str]) -> dict[str, Location]:
    """Every logical name with its place, for the layout (per-expert or fused) that each layer has.

    Args:
        config: The model; `tied_embeddings` makes lm_head the embedding's tensor.
        present: The checkpoint's tensor names, which decide between the layouts.
    """
    table = (config.vocabulary, config.model_dim)
    found = {"embedding": Location("model.embed_tokens.weight", table)}
    for layer in range(config.layers):
        prefix, source = f"layers.{layer}.", f"model.layers.{layer}."
        found.update((prefix + name, place) for name, place in attention(config, source))
        found.update((prefix + name, place) for name, place in mlp(config, layer, source, present))
    found["final_norm"] = Location("model.norm.weight", (config.model_dim,))
    found["lm_head"] = found["embedding"] if config.tied_embeddings else Location("lm_head.weight", table)
    return found


def attention(config: ModelConfig, source: str) -> Iterator[tuple[str, Location]]:
    """A layer's norms and projections."""
    model_dim, head_dim = config.model_dim, config.head_dim
    q_rows, kv_rows = config.heads * head_dim, config.kv_heads * head_dim
    yield "attention_norm", Location(f"{source}input_layernorm.weight", (model_dim,))
    yield "mlp_norm", Location(f"{source}post_attention_layernorm.weight", (model_dim,))
    for name in ("q_norm", "k_norm"):
        yield name, Location(f"{source}self_attn.{name}.weight", (head_dim,))
    shapes = {"q": (q_rows, model_dim), "k": (kv_rows, model_dim), "v": (kv_rows, model_dim), "o": (model_dim, q_rows)}
    for name, shape in shapes.items():
        yield name, Location(f"{source}self_attn.{name}_proj.weight", shape)
        if config.attention_bias:
            yield f"{name}_bias", Location(f"{source}self_attn.{name}_proj.bias", shape[:1])


def mlp(config: ModelConfig, layer: int, source: str, present: Container[str]) -> Iterator[tuple[str, Location]]:
    """A layer's router and experts; a dense MLP is expert 0 and has no router."""
    model_dim, hidden, experts = config.model_dim, config.layer_hidden(layer), config.layer_experts(layer)
    up, down = (hidden, model_dim), (model_dim, hidden)
    shapes = {"gate": up, "up": up, "down": down}
    if config.is_dense(layer):
        for name, shape in shapes.items():
            yield f"experts.0.{name}", Location(f"{source}mlp.{name}_proj.weight", shape)
        return
    yield "router", Location(f"{source}mlp.gate.weight", (experts, model_dim))
    gate_up, down_proj = f"{source}{GATE_UP}", f"{source}mlp.experts.down_proj"
    if gate_up in present:
        gate_up_shape = (experts, 2 * hidden, model_dim)
        for expert in range(experts):
            yield f"experts.{expert}.gate", Location(gate_up, gate_up_shape, expert, 0, hidden)
            yield f"experts.{expert}.up", Location(gate_up, gate_up_shape, expert, hidden, hidden)
            yield f"experts.{expert}.down", Location(down_proj, (experts, *down), expert)
        return
    for expert in range(experts):
        for name, shape in shapes.items():
            yield f"experts.{expert}.{name}", Location(f"{source}mlp.experts.{expert}.{name}_proj.weight", shape)


def kind_of_most(locations: Mapping[str, Location], kind_of: Callable[[str], str]) -> str:
    """The kind that most weights of the matrices have, but for those of which a store keeps every value anyway.

    Args:
        locations: By logical name, where it lies.
        kind_of: A tensor's kind.
    """
    places = {place.tensor: place for name, place in locations.items() if not name.endswith(("embedding", "router"))}
    weights = Counter[str]()
    for tensor, place in places.items():
        if len(place.tensor_shape) > 1:
            weights[kind_of(tensor)] += math.prod(place.tensor_shape)
    return weights.most_common(1)[0][0]
