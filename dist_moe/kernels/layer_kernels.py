"""Each half of a layer as one call, and the C structures that it reads, which are built once.

Legend: T tokens, D model dim, h query heads and g KV heads of this rank, P head dim, C = h * P, R = (h + 2 g) * P,
E experts, K experts per token, N = T * K. See native.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_moe.kernels.arrays import F32, I32, I64, U8, U64, F32Array, I32Array, I64Array, Pointer, U64Array
from dist_moe.kernels.buffers import ChunkFormats, ChunkList, KvView, MatrixList, Operand
from dist_moe.kernels.context import Context
from dist_moe.kernels.formats import ChunkFormat, OperandParts
from dist_moe.kernels.library import ffi, lib
from dist_moe.kernels.picks import ChunkHolders, Picks, Workers


@dataclass(frozen=True)
class LayerSizes:
    """What the layers of one rank's share have in common (`dm_sizes`)."""

    model_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    experts_per_token: int
    workers: Workers
    norm_topk_prob: bool
    eps: np.float32
    score_scale: np.float32
    kv_of_h: I32Array  # the local KV head of each local query head

    def struct(self) -> tuple[Pointer, Pointer]:
        """The C structure, and other memory that it points to; kv_of_h must stay alive, too."""
        workers, kept = self.workers.struct()
        struct = ffi.new(
            "dm_sizes *",
            {
                "D": self.model_dim,
                "h": self.heads,
                "g": self.kv_heads,
                "P": self.head_dim,
                "K": self.experts_per_token,
                "workers": workers,
                "norm_topk_prob": self.norm_topk_prob,
                "eps": self.eps,
                "score_scale": self.score_scale,
                "kv_of_h": I32.read(self.kv_of_h, self.heads),
            },
        )
        return struct, kept


class LayerBuffers:
    """The buffers of a step that both halves of a layer work in (`dm_buffers`), checked against the sizes."""

    def __init__(
        self,
        sizes: LayerSizes,
        *,
        x_TD: F32Array,
        sums_TD: I64Array,
        fault_T: I32Array,
        normed: Operand,
        attended: Operand,
        qkv_TR: F32Array,
        cos_TP: F32Array,
        sin_TP: F32Array,
        router_TE: F32Array,
        ids_TK: I32Array,
        weights_TK: F32Array,
        offset_E1: I32Array,
        token_N: I32Array,
        weight_N: F32Array,
        chunks: ChunkList,
        picks: Picks,
        work_L2: I64Array,
    ) -> None:
        """Point at the arrays, which are kept alive; T is the length of x_TD, L the number of layers."""
        self.max_tokens = T = len(x_TD)
        self.experts = E = router_TE.shape[1]
        self.chunk_capacity = chunks.capacity
        self.model_dim = D = sizes.model_dim
        h, P, K = sizes.heads, sizes.head_dim, max(1, sizes.experts_per_token)
        if normed.columns != D or attended.columns != h * P:
            raise TypeError(f"operands of {normed.columns} and {attended.columns} columns, not {D} and {h * P}")
        self._kept = {
            "x_TD": F32.write(x_TD, T, D),
            "sums_TD": I64.write(sums_TD, T, D),
            "fault_T": I32.write(fault_T, T),
            "normed": normed.for_parts(OperandParts.FLOATS, T),
            "attended": attended.for_parts(OperandParts.FLOATS, T),
            "qkv_TR": F32.write(qkv_TR, T, (h + 2 * sizes.kv_heads) * P),
            "cos_TP": F32.write(cos_TP, T, P // 2),
            "sin_TP": F32.write(sin_TP, T, P // 2),
            "router_TE": F32.write(router_TE, T, E),
            "ids_TK": I32.write(ids_TK, T, K),
            "weights_TK": F32.write(weights_TK, T, K),
            "offset_E1": I32.write(offset_E1, E + 1),
            "token_N": I32.write(token_N, T * K),
            "weight_N": F32.write(weight_N, T * K),
            "chunks": chunks.struct,
            "picks": picks.struct,
            "work_L2": I64.write(work_L2, len(work_L2), 2),
        }
        self.layers = len(work_L2)
        self.quantized = normed.quantized and attended.quantized
        self.picks = picks
        self.sizes: Pointer
        self.sizes, kept = sizes.struct()
        self._objects = (normed, attended, chunks, sizes.kv_of_h, kept)
        self.struct: Pointer = ffi.new("dm_buffers *", self._kept)
        self.residual = (self._kept["x_TD"], self._kept["fault_T"], self._kept["sums_TD"])


class AttentionLayer:
    """One layer's attention (`dm_attention_layer`)."""

    def __init__(
        self,
        sizes: LayerSizes,
        layer: int,
        cache_offset: int,
        *,
        norm_D: F32Array,
        q_norm_P: F32Array,
        k_norm_P: F32Array,
        qkv: MatrixList,
        qkv_bias_R: F32Array | None,
        o_units: MatrixList,
        o_bias_D: F32Array | None,
        normed_parts: OperandParts,
    ) -> None:
        """Take q, k and v rows of the local heads, and each head's columns of o_proj.

        Args:
            sizes: Of all layers.
            layer: For the faults.
            cache_offset: Bytes before the layer's part of a cache block.
            norm_D: The norm's gain.
            q_norm_P: The gain of the norm of each query head.
            k_norm_P: The gain of the norm of each KV head.
            qkv: h + 2 g matrices [P, D].
            qkv_bias_R: In the order of the qkv rows.
            o_units: h matrices [D, P].
            o_bias_D: Added once, after the exact sum over ranks.
            normed_parts: What q, k and v of some rank read: the same on all ranks.
        """
        h, D, P = sizes.heads, sizes.model_dim, sizes.head_dim
        rows = (h + 2 * sizes.kv_heads) * P
        if qkv.count * P != rows or qkv.out_columns != rows or o_units.count != h or not o_units.row_counts <= {D}:
            raise TypeError(f"layer {layer}: {qkv.count} matrices of q, k and v, {o_units.count} of o for {h} heads")
        if qkv.parts & ~normed_parts:
            raise TypeError(f"layer {layer}: q, k and v read {qkv.parts!r}, not {normed_parts!r}")
        self._matrices = (qkv, o_units)
        self._kept = {
            "norm_D": F32.read(norm_D, D),
            "q_norm_P": F32.read(q_norm_P, P),
            "k_norm_P": F32.read(k_norm_P, P),
            "qkv": qkv.for_columns(D),
            "qkv_bias_R": ffi.NULL if qkv_bias_R is None else F32.read(qkv_bias_R, rows),
            "o_units": o_units.for_columns(P),
        }
        self.layer = layer
        self.norm_D: Pointer = self._kept["norm_D"]
        self.bias_D: Pointer = ffi.NULL if o_bias_D is None else F32.read(o_bias_D, D)
        self.normed_parts = int(normed_parts)
        self.quantized = bool((normed_parts | o_units.parts) & OperandParts.INT8)
        values = {**self._kept, "cache_offset": cache_offset, "layer": layer}
        values |= {"normed_parts": self.normed_parts, "attended_parts": int(o_units.parts)}
        self.struct: Pointer = ffi.new("dm_attention_layer *", values)


class ExpertsLayer:
    """One layer's MLP (`dm_experts_layer`)."""

    def __init__(
        self,
        sizes: LayerSizes,
        layer: int,
        *,
        norm_D: F32Array,
        router: MatrixList | None,
        addresses: U64Array,
        formats: Sequence[ChunkFormat],
        owned: I64Array | None,
        experts: int,
        width: int,
        holders: ChunkHolders | None = None,
    ) -> None:
        """Take the router and the addresses of the chunks, whose memory the caller keeps alive.

        Args:
            sizes: Of all layers.
            layer: For the faults.
            norm_D: The norm's gain.
            router: One matrix [E, D]; None: a dense MLP, one expert that every token picks with weight 1.
            addresses: uint64 [E * chunks per expert], 0 where this host has no copy.
            formats: Of each expert's chunks, or one for all.
            owned: int64, the numbers of this rank's chunks; None: a node's chunks are dealt out in each step.
            experts: E.
            width: Hidden units per chunk.
            holders: Which nodes hold the chunks; None on one node.
        """
        self.layer = layer
        self.bias_D: Pointer = ffi.NULL
        self.routed = router is not None
        self.experts = experts
        self.chunk_count = len(addresses)
        if len(addresses) % experts or (owned is not None and len(owned) and int(owned.max()) >= len(addresses)):
            raise TypeError(f"layer {layer}: {len(addresses)} chunks of {experts} experts")
        if router is not None and (router.count, router.out_columns) != (1, experts):
            raise TypeError(f"layer {layer}: a router of {router.out_columns} rows for {experts} experts")
        if len(formats) not in (1, experts):
            raise TypeError(f"layer {layer}: {len(formats)} formats of {experts} experts")
        if holders is not None and holders.chunk_count > len(addresses):
            raise TypeError(f"layer {layer}: holders of {holders.chunk_count} chunks, not {len(addresses)}")
        if router is not None and router.parts != OperandParts.FLOATS:
            raise TypeError(f"layer {layer}: a quantized router")
        self._router, self.holders, self._formats = router, holders, ChunkFormats(formats)
        self._formats.set_read_costs(sizes.workers.read_cost, sizes.model_dim, width)
        self.normed_parts = int(self._formats.normed_parts)
        self.quantized = bool(self.normed_parts & OperandParts.INT8)
        self._own_C = np.zeros(len(addresses), np.uint8)
        if owned is not None:
            self._own_C[owned] = 1
        self._kept = {
            "norm_D": F32.read(norm_D, sizes.model_dim),
            "router": ffi.NULL if router is None else router.for_columns(sizes.model_dim),
            "chunks": ffi.cast("void **", U64.read(addresses, len(addresses))),
            "own_C": ffi.NULL if owned is None else U8.read(self._own_C, len(addresses)),
            "holders": ffi.NULL if holders is None else holders.struct,
            "formats": self._formats.struct,
        }
        self.norm_D: Pointer = self._kept["norm_D"]
        self.addresses = addresses
        numbers = {
            "experts": experts,
            "chunks_per_expert": len(addresses) // experts,
            "width": width,
            "format_step": self._formats.step,
            "normed_parts": self.normed_parts,
            "layer": layer,
        }
        self.struct: Pointer = ffi.new("dm_experts_layer *", {**self._kept, **numbers})


class LayerKernels(Context):
    """The chapter "halves of a layer" of dist_moe.h."""

    def attention_half(self, buffers: LayerBuffers, layer: AttentionLayer, view: KvView) -> None:
        """sums_TD = o_proj(attend(rope(norm(q)), rope(norm(k)), v)) of norm(x), over this rank's heads (rules 6, 10).

        The view's tokens are the first T rows of the buffers.
        """
        if view.tokens > buffers.max_tokens or layer.quantized > buffers.quantized:
            raise TypeError(f"{view.tokens} tokens in buffers of {buffers.max_tokens}, quantized={buffers.quantized}")
        lib.dm_attention_half(self._context, buffers.struct, buffers.sizes, layer.struct, view.struct, view.tokens)

    def compute_experts(self, buffers: LayerBuffers, layer: ExpertsLayer, tokens: int) -> None:
        """As `experts_half`, of the operand `normed` and of the step's choices by expert."""
        self._check_room(buffers, layer, tokens)
        lib.dm_compute_experts(self._context, buffers.struct, buffers.sizes, layer.struct, tokens)

    def experts_half(self, buffers: LayerBuffers, layer: ExpertsLayer, tokens: int) -> None:
        """sums_TD = sum of weight * down(silu(gate x) * up x) of norm(x), over this rank's chunks (rules 6, 7, 11)."""
        self._check_room(buffers, layer, tokens)
        lib.dm_experts_half(self._context, buffers.struct, buffers.sizes, layer.struct, tokens)

    def add_sums(self, buffers: LayerBuffers, half: AttentionLayer | ExpertsLayer, tokens: int) -> None:
        """Residual: x_TD += f32((sums_TD + o_proj's bias, if any) * 2^-32), after the sum over ranks (rule 7)."""
        assert tokens <= buffers.max_tokens
        x, fault, sums = buffers.residual
        lib.dm_add_exact(self._context, x, fault, sums, half.bias_D, tokens, buffers.model_dim, half.layer)

    @staticmethod
    def _check_room(buffers: LayerBuffers, layer: ExpertsLayer, tokens: int) -> None:
        fits = layer.chunk_count <= buffers.chunk_capacity and layer.experts <= buffers.experts
        fits = fits and buffers.picks.fits(layer.experts, layer.holders)
        fits = fits and layer.quantized <= buffers.quantized
        if not fits or tokens > buffers.max_tokens or layer.layer >= buffers.layers:
            raise TypeError(f"{tokens} tokens and {layer.chunk_count} chunks do not fit the buffers")
