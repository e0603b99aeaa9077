"""The forward pass of Qwen3 and Qwen3-MoE on one rank, its collectives in plain sight.

Shape suffixes: T tokens, D model dim, N rows whose logits are needed, v local vocabulary rows.
Source: transformers' Qwen3MoeModel; the order of every operation: the numerics contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import NO_FAULT, Kernels, KvFormat, KvView, OperandParts, Picks, hash_floats
from dist_moe.model.kv_cache import KvCache
from dist_moe.model.share import make_share
from dist_moe.model.step import MAX_LOGIT_ROWS, Step
from dist_moe.model.stopwatch import Part, Stopwatch
from dist_moe.model.token_parallel import TokenPass
from dist_moe.model.weights import load_weights
from dist_moe.model.workspace import make_workspace
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.plan import JobPlan
from dist_moe.parallel.progress import Phase
from dist_moe.parallel.token_exchange import TokenExchange
from dist_moe.parallel.token_owners import Owners
from dist_moe.store.reader import Store

Floats = npt.NDArray[np.float32]

# Told after each half of a layer: (layer, "attention" or "experts", the residual; of a partitioned step, only the rows
# that this rank owns are valid).
Observer = Callable[[int, str, Floats], None]


class Transformer:
    """One rank's part of a model: its weights, its KV cache and the buffers of a step."""

    def __init__(
        self,
        store: Store,
        job: JobPlan,
        exchange: Exchange,
        kernels: Kernels,
        kv_format: KvFormat,
        max_tokens: int,
        copy_weights: bool = False,
    ) -> None:
        """Map the weights and allocate the buffers.

        Args:
            store: The open store.
            job: All ranks' shares.
            exchange: The collectives.
            kernels: An ISA level with its threads.
            kv_format: How K and V are kept.
            max_tokens: Tokens of the largest step.
            copy_weights: Read them from private memory (once `weights.copy` is filled), not from the mapped files.

        Raises:
            StoreError: A unit that this rank needs is missing.
        """
        self.config = store.config
        self.share = make_share(store, job, exchange.world.rank)
        self.kernels = kernels
        self.exchange = exchange
        self.cache = KvCache(kv_format, self.config.layers, len(self.share.plan.kv_heads), self.config.head_dim)
        self.weights = load_weights(store, self.share, self.cache.layer_bytes, copy_weights)
        self.observer: Observer | None = None
        self.stopwatch = Stopwatch()
        self.state_hash = 0  # of what every rank holds alike; 0 on one rank alone
        self._hashes_state = exchange.world.size > 1
        most_chunks = max(layer.experts.chunk_count for layer in self.weights.layers)
        self._workspace = make_workspace(self.share, max_tokens=max_tokens, max_chunks=most_chunks)
        experts = [layer.experts for layer in self.weights.layers]
        nodes = len(self.share.sizes.workers.speeds)
        self._picks = Picks(nodes, max(layer.experts for layer in experts), [layer.holders for layer in experts])
        self._buffers = self._workspace.of_a_layer(self.share.sizes, self._picks)
        self._token_pass = TokenPass(
            kernels, TokenExchange(exchange), self.share, self._workspace, self._buffers, self.stopwatch
        )
        self._owners: Owners | None = None  # of the last step's tokens, if it was partitioned
        self._tokens = 0  # of the last step
        self._step: Step | None = None

    @property
    def fault_T(self) -> npt.NDArray[np.int32]:
        """The last step's fault of each token on this rank, NO_FAULT if there is none."""
        return self._workspace.fault_T[: self._tokens]

    @property
    def normed_TD(self) -> Floats:
        """What the matrices of the last half of a layer read before it is quantized, f32 [T, D]; for an observer."""
        return self._workspace.normed.x_TC[: self._tokens]

    @property
    def attended_TC(self) -> Floats:
        """What o_proj read, f32 [T, local heads * P], likewise."""
        return self._workspace.attended.x_TC[: self._tokens]

    @property
    def picked_TK(self) -> npt.NDArray[np.int32]:
        """The experts of the last layer that was routed, int32 [T, K]; for an observer."""
        return self._workspace.ids_TK[: self._tokens]

    @property
    def picked_weights_TK(self) -> Floats:
        """What the outputs of `picked_TK` are multiplied with, f32 [T, K]; for an observer."""
        return self._workspace.weights_TK[: self._tokens]

    @property
    def work_L2(self) -> npt.NDArray[np.int64]:
        """Chunks that this rank computed in each layer of the last step, and their products with a token."""
        return self._workspace.work_L2

    @property
    def last_step(self) -> Step:
        """The step that is being run, or was run last; for an observer."""
        assert self._step is not None
        return self._step

    def run_layers(self, step: Step) -> None:
        """Embed the step's tokens and run all layers; the residual stays in the workspace for `logits`."""
        buffers, mark = self._workspace, self.stopwatch.mark
        mark(Part.EXCHANGE)  # the step's words
        self._step = step
        T = self._tokens = step.tokens
        assert buffers.max_tokens >= T
        x_TD, sums_TD = buffers.x_TD[:T], buffers.sums_TD[:T]
        buffers.fault_T[:T] = NO_FAULT
        self._owners = self._token_pass.owners(T) if step.partitioned else None
        own = slice(0, T) if self._owners is None else slice(self._owners.own.start, self._owners.own.stop)
        cache = self.cache.view(step)
        self.kernels.embed(x_TD[own], self.weights.embedding_VD, step.flat_ids()[own])
        self.kernels.rope_angles(
            buffers.cos_TP, buffers.sin_TP, cache.position_T, self.config.inv_freq, self.config.attention_factor
        )
        mark(Part.EMBEDDING)
        for layer in range(self.config.layers):
            if self._owners is None:
                self._layer(layer, x_TD, sums_TD, cache)
            else:
                self._partitioned_layer(layer, self._owners, cache)
        if self._owners is None:
            self._hash_state(x_TD)
        mark(Part.OTHER)

    def _layer(self, layer: int, x_TD: Floats, sums_TD: npt.NDArray[np.int64], cache: KvView) -> None:
        """X += exact(allreduce(attention(norm(x)))), then x += exact(allreduce(experts(norm(x))))."""
        kernels, exchange, buffers, weights = self.kernels, self.exchange, self._buffers, self.weights.layers[layer]
        progress = exchange.world.progress
        timed, mark = self.stopwatch.runs, self.stopwatch.mark
        progress.layer = layer

        progress.phase = Phase.ATTENTION
        kernels.attention_half(buffers, weights.attention, cache)
        if timed:
            mark(Part.ATTENTION)
        exchange.sum_exact(sums_TD)
        if timed:
            mark(Part.EXCHANGE)
        kernels.add_sums(buffers, weights.attention, len(x_TD))
        if timed:
            mark(Part.ATTENTION)
        self._observe(layer, "attention", x_TD)

        progress.phase = Phase.EXPERTS
        kernels.experts_half(buffers, weights.experts, len(x_TD))
        if timed:
            mark(Part.EXPERTS)
        exchange.sum_exact(sums_TD)
        if timed:
            mark(Part.EXCHANGE)
        kernels.add_sums(buffers, weights.experts, len(x_TD))
        if timed:
            mark(Part.EXPERTS)
        if weights.experts.routed:
            self._hash_state(self._workspace.weights_TK[: len(x_TD)])
        self._observe(layer, "experts", x_TD)
        if timed:
            mark(Part.OTHER)  # the hash, and whoever watches

    def _partitioned_layer(self, layer: int, owners: Owners, cache: KvView) -> None:
        """The same where only owners have x; see `TokenPass`."""
        progress, weights, buffers = self.exchange.world.progress, self.weights.layers[layer], self._workspace
        T = owners.count
        progress.layer = layer
        progress.phase = Phase.ATTENTION
        self._token_pass.attention(weights, owners, cache)
        if layer == self.config.layers - 1:  # the last that all ranks hold alike
            is_int8 = weights.attention.normed_parts & OperandParts.INT8
            self._hash_state(buffers.normed.scale_TG[:T] if is_int8 else buffers.normed.x_TC[:T])
        self._observe(layer, "attention", buffers.x_TD[:T])
        progress.phase = Phase.EXPERTS
        self._token_pass.experts(weights, owners)
        if weights.experts.routed:
            self._hash_state(buffers.weights_TK[:T])
        self._observe(layer, "experts", buffers.x_TD[:T])
        self.stopwatch.mark(Part.OTHER)

    def logits(self, rows: Sequence[int]) -> Floats:
        """This rank's logits of some tokens of the last step.

        Args:
            rows: Tokens of the flattened batch, at most MAX_LOGIT_ROWS.

        Returns:
            f32 [N, v], valid until the next call.
        """
        assert len(rows) <= MAX_LOGIT_ROWS
        share, buffers = self.share, self._workspace
        N = len(rows)
        self.exchange.world.progress.phase = Phase.LOGITS
        x_ND = buffers.head_x_ND[:N]
        np.take(buffers.x_TD, rows, axis=0, out=x_ND)  # not valid where another rank owns the token
        fault_N = buffers.head_fault_N[:N]
        fault_N.fill(NO_FAULT)
        logits_Nv = buffers.logits_Nv[:N]
        self.kernels.rmsnorm(buffers.head.x_TC[:N], x_ND, self.weights.final_norm_D, self.config.eps)
        if share.head_parts & OperandParts.INT8:
            self.kernels.quantize(buffers.head, fault_N, N, self.config.layers)
        if self._owners is not None:
            self._gather_head(self._owners.among(rows), fault_N)
        self.kernels.matmul(logits_Nv, self.weights.vocabulary, buffers.head, N)
        self.add_faults(rows, fault_N)
        self.stopwatch.mark(Part.LM_HEAD)
        return logits_Nv

    def _gather_head(self, owners: Owners, fault_N: npt.NDArray[np.int32]) -> None:
        """Take lm_head's operand, and what went wrong with it, from the owners of its rows."""
        others_N = np.ones(len(fault_N), np.bool_)
        others_N[owners.own.start : owners.own.stop] = False
        fault_N[others_N] = NO_FAULT
        self.stopwatch.mark(Part.LM_HEAD)
        self._token_pass.gather_head(owners)
        self.stopwatch.mark(Part.EXCHANGE)

    def add_faults(self, rows: Sequence[int], fault_N: npt.NDArray[np.int32]) -> None:
        """Note faults that were found in the logits of some tokens; the lowest one of each token stays."""
        fault_T = self._workspace.fault_T
        for row, fault in zip(rows, fault_N.tolist(), strict=True):
            if fault < fault_T[row]:
                fault_T[row] = fault

    def _hash_state(self, values: Floats) -> None:
        if self._hashes_state:
            self.state_hash = hash_floats(values, self.state_hash)

    def _observe(self, layer: int, half: str, x_TD: Floats) -> None:
        if self.observer is not None:
            self.observer(layer, half, x_TD)
