"""This rank's weights: views into the mapped store, or into a copy of it, laid out as the maths reads them.

Shape suffixes: V vocabulary, D model dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import (
    AttentionLayer,
    ChunkFormat,
    ChunkHolders,
    ExpertsLayer,
    MatrixFormat,
    MatrixList,
    packed_bytes,
    parts_read,
)
from dist_moe.model.share import Share
from dist_moe.parallel.expert_plan import runs_of_layer
from dist_moe.parallel.plan import Plan
from dist_moe.split import VOCABULARY_BLOCK
from dist_moe.store.manifest import Manifest
from dist_moe.store.private_copy import PrivateCopy
from dist_moe.store.reader import Store
from dist_moe.store.units import UnitKind, layer_chunk_width

Floats = npt.NDArray[np.float32]


class UnitSource(Protocol):
    """Where packed weights are read: a store, or something that stands in for it."""

    def common(self, name: str) -> npt.NDArray[Any]:
        """As Store.common."""

    def unit(self, kind: UnitKind, layer: int, index: int) -> npt.NDArray[np.uint8]:
        """As Store.unit."""

    def chunk_addresses(self, layer: int, wanted: Iterable[int]) -> npt.NDArray[np.uint64]:
        """As Store.chunk_addresses."""


@dataclass(frozen=True)
class LayerWeights:
    """Both halves of a layer."""

    attention: AttentionLayer
    experts: ExpertsLayer


@dataclass(frozen=True)
class ModelWeights:
    """All that one rank computes with: views and addresses, valid as long as `store` and `copy` keep their memory."""

    store: Store
    copy: PrivateCopy | None
    embedding_VD: npt.NDArray[np.float32] | npt.NDArray[np.uint16]
    layers: tuple[LayerWeights, ...]
    final_norm_D: Floats
    vocabulary: MatrixList


def load_weights(store: Store, share: Share, cache_layer_bytes: int, copied: bool = False) -> ModelWeights:
    """Map this rank's share of a store, or prepare to copy it into memory.

    Args:
        store: The store.
        share: What is this rank's.
        cache_layer_bytes: A layer's part of a block of the KV cache.
        copied: Read it from private huge pages, which hold it after `copy.fill`.

    Raises:
        StoreError: A unit that the share needs is not in the files of this host.
    """
    copy = PrivateCopy(store) if copied else None
    source = copy or store
    return ModelWeights(
        store=store,
        copy=copy,
        embedding_VD=store.common("embedding"),
        layers=tuple(
            LayerWeights(
                attention_weights(store, source, share, layer, layer * cache_layer_bytes),
                expert_weights(store, source, share, layer),
            )
            for layer in range(store.config.layers)
        ),
        final_norm_D=store.common("final_norm"),
        vocabulary=vocabulary_weights(store, source, share.plan),
    )


def attention_weights(store: Store, source: UnitSource, share: Share, layer: int, cache_offset: int) -> AttentionLayer:
    """A layer's attention on this rank, its units as `source` has them."""
    config, manifest, plan = store.config, store.manifest, share.plan
    store.require("head", layer, plan.heads)
    store.require("kv_head", layer, plan.kv_heads)
    P, D = config.head_dim, config.model_dim
    q, k, v, o = (manifest.matrix_format(key, layer) for key in "qkvo")
    q_bytes, k_bytes = (packed_bytes(fmt.format, P, D, fmt.group) for fmt in (q, k))
    heads = [source.unit("head", layer, head) for head in plan.heads]
    kv_heads = [source.unit("kv_head", layer, head) for head in plan.kv_heads]
    rows = [(head[:q_bytes], q) for head in heads]
    rows += [(kv_head[:k_bytes], k) for kv_head in kv_heads]
    rows += [(kv_head[k_bytes:], v) for kv_head in kv_heads]
    name = f"layers.{layer}."
    return AttentionLayer(
        share.sizes,
        layer,
        cache_offset,
        norm_D=store.common(name + "attention_norm"),
        q_norm_P=store.common(name + "q_norm"),
        k_norm_P=store.common(name + "k_norm"),
        qkv=MatrixList([(unit, P, i * P, fmt) for i, (unit, fmt) in enumerate(rows)]),
        qkv_bias_R=_qkv_bias(store, plan, name),
        o_units=MatrixList([(head[q_bytes:], D, 0, o) for head in heads]),
        o_bias_D=store.common(name + "o_bias") if config.attention_bias else None,
        normed_parts=parts_read((q, k, v)),
    )


def _qkv_bias(store: Store, plan: Plan, name: str) -> Floats | None:
    config = store.config
    if not config.attention_bias:
        return None
    head_dim = config.head_dim
    parts = [(store.common(name + "q_bias"), plan.heads)]
    parts += [(store.common(name + key), plan.kv_heads) for key in ("k_bias", "v_bias")]
    return np.concatenate([bias.reshape(-1, head_dim)[list(heads)].ravel() for bias, heads in parts])


def expert_weights(store: Store, source: UnitSource, share: Share, layer: int) -> ExpertsLayer:
    """A layer's router and chunks on this rank, as `source` has them."""
    config, manifest = store.config, store.manifest
    experts = config.layer_experts(layer)
    owned, wanted = share.plan.owned_chunks(layer), share.plan.readable_chunks(layer).tolist()
    store.require("chunk", layer, wanted)
    router = None
    if not config.is_dense(layer):
        router_format = MatrixFormat(manifest.router_format, 0)
        router = MatrixList([(source.common(f"layers.{layer}.router"), experts, 0, router_format)])
    runs = runs_of_layer(share.job, layer, experts)
    return ExpertsLayer(
        share.sizes,
        layer,
        norm_D=store.common(f"layers.{layer}.mlp_norm"),
        router=router,
        addresses=source.chunk_addresses(layer, wanted),
        formats=_chunk_formats(manifest, layer),
        owned=owned,
        experts=experts,
        width=layer_chunk_width(config, manifest.group_size, layer),
        holders=None if runs is None else ChunkHolders(runs.runs_R5, runs.node_H, share.job.nodes),
    )


def _chunk_formats(manifest: Manifest, layer: int) -> list[ChunkFormat]:
    """Of each expert's chunks, or one for all."""
    formats = manifest.formats.layers[layer]
    pairs = list(zip(formats.gate_up, formats.down, strict=True))
    kinds = {pair: ChunkFormat(*pair) for pair in set(pairs)}
    return list(kinds.values()) if len(kinds) == 1 else [kinds[pair] for pair in pairs]


def vocabulary_weights(store: Store, source: UnitSource, plan: Plan) -> MatrixList:
    """This rank's rows of lm_head, as `source` has them."""
    config, manifest = store.config, store.manifest
    store.require("vocabulary", 0, plan.vocabulary_blocks)
    last_rows, fmt = plan.vocabulary_rows % VOCABULARY_BLOCK, manifest.matrix_format("lm_head", 0)
    matrices = [
        (source.unit("vocabulary", 0, block), VOCABULARY_BLOCK, place * VOCABULARY_BLOCK, fmt)
        for place, block in enumerate(plan.vocabulary_blocks)
    ]
    if last_rows:  # the model's last block is padded
        unit, _, column, _ = matrices[-1]
        used_bytes = packed_bytes(fmt.format, last_rows, config.model_dim, fmt.group)
        matrices[-1] = unit[:used_bytes], last_rows, column, fmt
    return MatrixList(matrices)
