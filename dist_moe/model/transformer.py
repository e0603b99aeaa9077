"""The forward pass of Qwen3 and Qwen3-MoE on one rank, its collectives in plain sight.

Shape suffixes: T tokens, D model dim, N rows whose logits are needed, v local vocabulary rows.
Source: transformers' Qwen3MoeModel; the order of every operation: the numerics contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import NO_FAULT, Kernels, KvFormat, KvView, hash_floats
from dist_moe.model.attention import attention_sums
from dist_moe.model.kv_cache import KvCache
from dist_moe.model.moe import expert_sums
from dist_moe.model.share import make_share
from dist_moe.model.step import MAX_LOGIT_ROWS, Step
from dist_moe.model.weights import load_weights
from dist_moe.model.workspace import Workspace, make_workspace
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.plan import Plan
from dist_moe.parallel.progress import Phase
from dist_moe.store.reader import Store

Floats = npt.NDArray[np.float32]

# Told after each half of a layer: (layer, "attention" or "experts", the residual).
Observer = Callable[[int, str, Floats], None]


class Transformer:
    """One rank's part of a model: its weights, its KV cache and the buffers of a step."""

    def __init__(
        self, store: Store, plan: Plan, exchange: Exchange, kernels: Kernels, kv_format: KvFormat, max_tokens: int
    ) -> None:
        """Map the weights and allocate the buffers.

        Args:
            store: The open store.
            plan: This rank's share.
            exchange: The collectives.
            kernels: An ISA level with its threads.
            kv_format: How K and V are kept.
            max_tokens: Tokens of the largest step.

        Raises:
            StoreError: A unit that this rank needs is missing.
        """
        self.share = make_share(store, plan, kernels)
        self.config = store.config
        self.kernels = kernels
        self.exchange = exchange
        self.weights = load_weights(store, plan)
        self.cache = KvCache(kv_format, self.config.layers, len(plan.kv_heads), self.config.head_dim)
        self.observer: Observer | None = None
        self.state_hash = 0  # of what every rank holds alike; 0 on one rank alone
        self._hashes_state = exchange.world.size > 1
        self._workspace = make_workspace(
            self.config,
            plan,
            quantized=self.share.quantized,
            max_tokens=max_tokens,
            max_chunks=max(len(layer.experts.addresses) for layer in self.weights.layers),
            vocabulary_rows=len(plan.vocabulary_rows),
        )
        self._step_buffers = self._workspace

    @property
    def fault_T(self) -> npt.NDArray[np.int32]:
        """The last step's fault of each token on this rank, NO_FAULT if there is none."""
        return self._step_buffers.fault_T

    @property
    def picked_TK(self) -> npt.NDArray[np.int32]:
        """The experts of the last layer that was routed, int32 [T, K]; for an observer."""
        return self._step_buffers.ids_TK

    def run_layers(self, step: Step) -> None:
        """Embed the step's tokens and run all layers; the residual stays in the workspace for `logits`."""
        buffers = self._step_buffers = self._workspace.first(step.tokens)
        buffers.fault_T.fill(NO_FAULT)
        cache = self.cache.view(step)
        ids_T = np.concatenate([np.array(part.ids, dtype=np.int32) for part in step.slices])
        self.kernels.embed(buffers.x_TD, self.weights.embedding_VD, ids_T)
        position_T = np.concatenate([np.arange(len(part.ids)) + part.position for part in step.slices])
        self.kernels.rope_angles(
            buffers.cos_TP, buffers.sin_TP, position_T, self.config.inv_freq, self.config.attention_factor
        )
        for layer in range(self.config.layers):
            self._layer(layer, buffers, cache)
        self._hash_state(buffers.x_TD)

    def _layer(self, layer: int, buffers: Workspace, cache: KvView) -> None:
        weights = self.weights.layers[layer]
        progress = self.exchange.world.progress
        progress.layer = layer
        cache.select_layer(self.cache.layer_offset(layer))

        progress.phase = Phase.ATTENTION
        sums_TD = attention_sums(self.share, weights.attention, buffers, cache, layer)
        self.exchange.sum_exact(sums_TD)
        self.kernels.add_exact(buffers.x_TD, buffers.fault_T, sums_TD, weights.attention.o_bias_D, layer)
        self._observe(layer, "attention", buffers)

        progress.phase = Phase.EXPERTS
        sums_TD = expert_sums(self.share, weights.experts, buffers, layer)
        self.exchange.sum_exact(sums_TD)
        self.kernels.add_exact(buffers.x_TD, buffers.fault_T, sums_TD, None, layer)
        if weights.experts.router is not None:
            self._hash_state(buffers.weights_TK)
        self._observe(layer, "experts", buffers)

    def logits(self, rows: Sequence[int]) -> Floats:
        """This rank's logits of some tokens of the last step.

        Args:
            rows: Tokens of the flattened batch, at most MAX_LOGIT_ROWS.

        Returns:
            f32 [N, v], valid until the next call.
        """
        assert len(rows) <= MAX_LOGIT_ROWS
        share, buffers = self.share, self._step_buffers
        N = len(rows)
        self.exchange.world.progress.phase = Phase.LOGITS
        x_ND = buffers.head_x_ND[:N]
        np.take(buffers.x_TD, rows, axis=0, out=x_ND)
        fault_N = buffers.head_fault_N[:N]
        fault_N.fill(NO_FAULT)
        logits_Nv = buffers.logits_Nv[:N]
        self.kernels.rmsnorm(buffers.head.x_TC[:N], x_ND, self.weights.final_norm_D, self.config.eps)
        if share.quantized:
            self.kernels.quantize(buffers.head, fault_N, N, self.config.layers)
        self.kernels.matmul(logits_Nv, self.weights.vocabulary, buffers.head, N, share.format, share.group_size)
        self.add_faults(rows, fault_N)
        return logits_Nv

    def add_faults(self, rows: Sequence[int], fault_N: npt.NDArray[np.int32]) -> None:
        """Note faults that were found in the logits of some tokens; the lowest one of each token stays."""
        fault_T = self._step_buffers.fault_T
        np.minimum.at(fault_T, list(rows), fault_N)

    def _hash_state(self, values: Floats) -> None:
        if self._hashes_state:
            self.state_hash = hash_floats(values, self.state_hash)

    def _observe(self, layer: int, half: str, buffers: Workspace) -> None:
        if self.observer is not None:
            self.observer(layer, half, buffers.x_TD)
