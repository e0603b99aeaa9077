"""Kernels of attention: rotation, the key/value cache, scores and values.

Legend: T tokens, h query heads, g KV heads of this rank, P head dim, R columns of a row of q, k and v, C = h * P.
See native.py.
"""

from __future__ import annotations

import numpy as np

from dist_moe.kernels.arrays import F32, I32, I64, F32Array, I32Array, I64Array, columns_pointer
from dist_moe.kernels.buffers import KvView
from dist_moe.kernels.context import Context
from dist_moe.kernels.library import lib


class AttentionKernels(Context):
    """The chapter "attention" of dist_moe.h."""

    def rope_angles(
        self,
        cos_TP: F32Array,
        sin_TP: F32Array,
        position_T: I64Array,
        inv_freq_P: F32Array,
        factor: float | np.float32,
    ) -> None:
        """Cosines and sines, float32 [T, P/2], of position * inv_freq, times YaRN's factor."""
        tokens, half = len(position_T), len(inv_freq_P)
        cos, sin = F32.write(cos_TP, tokens, half), F32.write(sin_TP, tokens, half)
        position, inv_freq = I64.read(position_T, tokens), F32.read(inv_freq_P, half)
        lib.dm_rope_angles(self._context, cos, sin, position, inv_freq, factor, tokens, half)

    def norm_rope(
        self,
        rows_TR: F32Array,
        first_column: int,
        heads: int,
        gain_P: F32Array,
        cos_TP: F32Array,
        sin_TP: F32Array,
        eps: float | np.float32,
        tokens: int | None = None,
    ) -> None:
        """RMSNorm and rotation in place of the heads that begin at `first_column` of `tokens` rows of rows_TR."""
        head_dim, stride, tokens = len(gain_P), rows_TR.shape[1], len(rows_TR) if tokens is None else tokens
        rows = columns_pointer(rows_TR, tokens, first_column, heads * head_dim)
        cos, sin = F32.read(cos_TP, tokens, head_dim // 2), F32.read(sin_TP, tokens, head_dim // 2)
        gain = F32.read(gain_P, head_dim)
        lib.dm_norm_rope(self._context, rows, gain, cos, sin, eps, tokens, heads, head_dim, stride)

    def kv_store(
        self,
        view: KvView,
        fault_T: I32Array,
        qkv_TR: F32Array,
        k_column: int,
        v_column: int,
        kv_heads: int,
        head_dim: int,
        layer: int,
    ) -> None:
        """Narrow the K and V of the view's tokens, which begin at two columns of qkv_TR, into the cache (rule 9)."""
        tokens, width, stride = view.tokens, kv_heads * head_dim, qkv_TR.shape[1]
        k, v = columns_pointer(qkv_TR, tokens, k_column, width), columns_pointer(qkv_TR, tokens, v_column, width)
        fault = I32.write(fault_T, tokens)
        lib.dm_kv_store(self._context, view.struct, fault, k, v, tokens, kv_heads, head_dim, stride, layer)

    def attention(
        self,
        out_TC: F32Array,
        fault_T: I32Array,
        qkv_TR: F32Array,
        view: KvView,
        kv_of_h: I32Array,
        score_scale: float | np.float32,
        kv_heads: int,
        head_dim: int,
        layer: int,
    ) -> None:
        """Causal attention of the view's tokens over fixed blocks of 64 positions (rule 10).

        Args:
            out_TC: float32 [T, h * P].
            fault_T: int32 [T].
            qkv_TR: float32 [T, >= h * P]; the query heads come first in a row.
            view: The cache, the tokens' own K and V stored.
            kv_of_h: int32 [h], the local KV head of each local query head.
            score_scale: f32(P^-1/2).
            kv_heads: Local KV heads in the cache, g.
            head_dim: P.
            layer: For the faults.
        """
        tokens, heads, stride = view.tokens, len(kv_of_h), qkv_TR.shape[1]
        out, q = F32.write(out_TC, tokens, heads * head_dim), columns_pointer(qkv_TR, tokens, 0, heads * head_dim)
        fault, kv = I32.write(fault_T, tokens), I32.read(kv_of_h, heads)
        lib.dm_attention(
            self._context, out, fault, q, view.struct, kv, score_scale, tokens, heads, kv_heads, head_dim, stride, layer
        )
