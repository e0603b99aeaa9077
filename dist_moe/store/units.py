"""Units: the smallest things that a rank can own, their counts and their bytes.

D model dim, P head dim, F hidden units of one expert. A unit is one run of bytes, 64-byte aligned:
- head: q rows [P, D], then o_proj columns [D, P] (one query head);
- kv_head: k rows [P, D], then v rows [P, D];
- chunk: gate [width, D], up [width, D], down [D, width] (one slice of one expert);
- vocabulary: 128 rows of lm_head [128, D], the last block zero-padded.
"""

from __future__ import annotations

from typing import Literal, get_args

from dist_moe.errors import UsageError
from dist_moe.kernels.formats import GROUP, VOCABULARY_BLOCK, WeightFormat
from dist_moe.model_config import ModelConfig, chunk_width, round_up

UnitKind = Literal["head", "kv_head", "chunk", "vocabulary"]
UNIT_KINDS: tuple[UnitKind, ...] = get_args(UnitKind)
GROUP_SIZES = (32, 64, 128, 0)  # weights per scale; 0 is a whole row
MAX_UNITS = 8191  # NUMERICS rule 7: terms of one fixed-point sum

_TENSOR_SUFFIX = {"head": "heads", "kv_head": "kv_heads", "chunk": "chunks"}


def tensor_name(kind: UnitKind, layer: int) -> str:
    """The tensor that holds the units of one kind; `layer` is ignored for the vocabulary, which has none."""
    return "vocabulary" if kind == "vocabulary" else f"layers.{layer}.{_TENSOR_SUFFIX[kind]}"


def layer_chunk_width(config: ModelConfig, group_size: int, layer: int) -> int:
    """Hidden units of each of a layer's chunks (NUMERICS rule 8)."""
    return chunk_width(config.layer_hidden(layer), group_size)


def chunks_per_expert(config: ModelConfig, group_size: int, layer: int) -> int:
    """Chunks of each expert of a layer; a dense MLP is one expert."""
    return round_up(config.layer_hidden(layer), 32) // layer_chunk_width(config, group_size, layer)


def output_group(config: ModelConfig, group_size: int) -> int:
    """The group of o_proj's columns: no group crosses a head (NUMERICS rule 6)."""
    return min(group_size, config.head_dim) if group_size else config.head_dim


def unit_count(config: ModelConfig, group_size: int, kind: UnitKind, layer: int) -> int:
    """Units of one kind in one layer of the whole model."""
    if kind == "head":
        return config.heads
    if kind == "kv_head":
        return config.kv_heads
    if kind == "chunk":
        return config.layer_experts(layer) * chunks_per_expert(config, group_size, layer)
    return -(-config.vocabulary // VOCABULARY_BLOCK)


def unit_label(kind: UnitKind, layer: int) -> str:
    """How units of one kind in one layer are called, with a % for each number: "layer 3, expert %, chunk %"."""
    if kind == "vocabulary":
        return "vocabulary block %"
    names = {"chunk": "expert %, chunk %", "head": "query head %", "kv_head": "KV head %"}
    return f"layer {layer}, {names[kind]}"


def describe_unit(config: ModelConfig, group_size: int, kind: UnitKind, layer: int, index: int) -> str:
    """One unit in words, for error messages: "layer 3, expert 17, chunk 2"."""
    chunked = kind == "chunk"
    numbers = divmod(index, chunks_per_expert(config, group_size, layer)) if chunked else (index,)
    label = unit_label(kind, layer)
    for number in numbers:
        label = label.replace("%", str(number), 1)
    return label


def check_format(config: ModelConfig, fmt: WeightFormat, group_size: int) -> None:
    """Refuse a weight format or group size that the model's shapes cannot have.

    Raises:
        UsageError: No chunk width fits, or a quantized head_dim is not a multiple of 32; says what works.
    """
    if fmt.quantized and config.head_dim % GROUP:
        raise UsageError(
            f"head_dim {config.head_dim} is not a multiple of {GROUP}, which {fmt.label} needs; "
            "use --quant bf16 or --quant f32 for this model"
        )
    sizes = sorted({config.layer_hidden(layer) for layer in range(config.layers)})
    working = [group for group in GROUP_SIZES if all(chunk_width(hidden, group) for hidden in sizes)]
    if group_size not in working:
        raise UsageError(
            f"group size {group_size} does not fit MLPs of {', '.join(map(str, sizes))} hidden units; "
            f"use --group-size {' or '.join(map(str, working))}"
        )
    _check_sums(config, group_size)


def _check_sums(config: ModelConfig, group_size: int) -> None:
    terms = [config.heads]
    for layer in range(config.layers):
        picked = 1 if config.is_dense(layer) else config.experts_per_token
        terms.append(picked * chunks_per_expert(config, group_size, layer))
    if max(terms) > MAX_UNITS:
        raise UsageError(f"this model adds {max(terms)} units in one sum; at most {MAX_UNITS} stay exact")
