"""The kernels of a model's layers, part by part, on one rank: each half of a layer, and single experts.

Legend: T tokens, D model dim, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_moe.errors import StoreError
from dist_moe.kernels import NO_FAULT, Kernels, KvFormat, Picks
from dist_moe.kernels.arrays import F32Array, F64Array, I32Array, I64Array
from dist_moe.model.kv_cache import KvCache
from dist_moe.model.share import make_share
from dist_moe.model.step import Slice, Step
from dist_moe.model.weights import load_weights
from dist_moe.model.workspace import make_workspace
from dist_moe.parallel.plan import plan_job
from dist_moe.store.reader import Store


@dataclass(frozen=True)
class Routed:
    """What a layer's MLP did for T tokens; a dense one has one expert of weight 1 and no logits."""

    normed_TD: F32Array
    logits_TE: F32Array
    ids_TK: I32Array
    weights_TK: F32Array
    sums_TD: I64Array


class Parts:
    """A store's layers at one ISA level, for one sequence of T tokens from position 0; its cache keeps float32."""

    def __init__(self, store: Store, kernels: Kernels, ids: Sequence[int]) -> None:
        """Map all weights of a store.

        Raises:
            StoreError: Some of it is not on this machine.
        """
        self.config, self.kernels, self.tokens = store.config, kernels, len(ids)
        job = plan_job(store.config, store.manifest.group_size, "shared", node_of_rank=(0,))
        share = make_share(store, job, 0)
        cache = KvCache(KvFormat.F32, store.config.layers, store.config.kv_heads, store.config.head_dim)
        self._weights = load_weights(store, share, cache.layer_bytes)
        experts = [layer.experts for layer in self._weights.layers]
        self._space = make_workspace(
            share, max_tokens=self.tokens, max_chunks=max(layer.chunk_count for layer in experts)
        )
        picks = Picks(1, max(layer.experts for layer in experts), [layer.holders for layer in experts])
        self._buffers = self._space.of_a_layer(share.sizes, picks)
        self._cache = cache
        self._step = Step((Slice(0, 0, tuple(ids)),), (), (), False, store.config.vocabulary)
        self._view = cache.view(self._step)
        kernels.rope_angles(
            self._space.cos_TP,
            self._space.sin_TP,
            self._view.position_T,
            store.config.inv_freq,
            store.config.attention_factor,
        )

    def embed(self) -> F32Array:
        """The embeddings of the sequence, f32 [T, D]."""
        x_TD = np.empty((self.tokens, self.config.model_dim), np.float32)
        self.kernels.embed(x_TD, self._weights.embedding_VD, self._step.flat_ids())
        return x_TD

    def attention(self, layer: int, x_TD: F32Array) -> I64Array:
        """The exact sums of attention over heads, int64 [T, D], without o_proj's bias."""
        self._take(x_TD)
        self.kernels.attention_half(self._buffers, self._weights.layers[layer].attention, self._view)
        return self._sums(layer)

    def after_attention(self, layer: int, x_TD: F32Array) -> F32Array:
        """The residual after attention."""
        self.attention(layer, x_TD)
        self.kernels.add_sums(self._buffers, self._weights.layers[layer].attention, self.tokens)
        return self._space.x_TD.copy()

    def experts(self, layer: int, x_TD: F32Array) -> Routed:
        """The exact sums of the MLP, and how they came about."""
        self._take(x_TD)
        half, space = self._weights.layers[layer].experts, self._space
        self.kernels.experts_half(self._buffers, half, self.tokens)
        routed = half.routed
        return Routed(
            space.normed.x_TC.copy(),
            space.router_TE[:, : half.experts].copy() if routed else np.zeros((self.tokens, 0), np.float32),
            space.ids_TK.copy() if routed else np.zeros((self.tokens, 1), np.int32),
            space.weights_TK.copy() if routed else np.ones((self.tokens, 1), np.float32),
            self._sums(layer),
        )

    def after_experts(self, layer: int, x_TD: F32Array) -> tuple[F32Array, Routed]:
        """The residual after the MLP, and how it came about."""
        routed = self.experts(layer, x_TD)
        self.kernels.add_sums(self._buffers, self._weights.layers[layer].experts, self.tokens)
        return self._space.x_TD.copy(), routed

    def expert(self, layer: int, number: int, x_TD: F32Array) -> Routed:
        """As `experts`, of one expert of weight 1; the others are picked with weight 0, which adds nothing."""
        if not self._weights.layers[layer].experts.routed:
            return self.experts(layer, x_TD)
        self._take(x_TD)
        half, space, tokens = self._weights.layers[layer].experts, self._space, self.tokens
        self.kernels.norm_tokens(self._buffers, half, range(tokens))
        chosen = self.config.experts_per_token
        space.ids_TK[:] = [number, *(other for other in range(half.experts) if other != number)][:chosen]
        space.weights_TK[:] = [1.0] + [0.0] * (chosen - 1)
        self.kernels.group_tokens(self._buffers, half, tokens)
        self.kernels.compute_experts(self._buffers, half, tokens)
        none = np.zeros((tokens, 0), np.float32)
        return Routed(space.normed.x_TC.copy(), none, space.ids_TK.copy(), space.weights_TK.copy(), self._sums(layer))

    def _take(self, x_TD: F32Array) -> None:
        self._space.x_TD[...] = x_TD
        self._space.fault_T.fill(NO_FAULT)

    def _sums(self, layer: int) -> I64Array:
        if (self._space.fault_T != NO_FAULT).any():
            raise StoreError(
                f"layer {layer}: the model's numbers overflow, so there is nothing to compare: examine its weights "
                "with dist-moe inspect --against SOURCE"
            )
        return self._space.sums_TD.copy()


def sums_as_values(sums_TD: I64Array) -> F64Array:
    """What exact sums stand for."""
    return np.asarray(sums_TD * 2.0**-32, np.float64)
