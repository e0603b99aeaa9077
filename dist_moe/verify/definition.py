"""A model's layers in float64 NumPy, from its weights as numbers: what the C kernels are compared with.

Source: transformers' Qwen3MoeModel. Where weights are q8 or q4, what they are multiplied with is rounded to int8 by
rule 5 of the numerics contract. Legend: T tokens, D model dim, H query heads, G KV heads, P head dim, E experts,
K experts per token, F hidden units, V vocabulary, C = H * P.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from dist_moe.checkpoint.source import Source
from dist_moe.kernels import reference
from dist_moe.kernels.arrays import Array, F64Array, I32Array
from dist_moe.model_config import ModelConfig
from dist_moe.store.decoded import DecodedStore


class Weights(Protocol):
    """A model's tensors by their logical names."""

    @property
    def config(self) -> ModelConfig:
        """Its sizes."""

    def tensor(self, name: str) -> F64Array:
        """One of them."""

    def rows(self, name: str) -> Iterator[F64Array]:
        """A matrix in slices of rows, ascending."""

    def quantized(self, key: str, layer: int, expert: int = 0) -> bool:
        """Whether a matrix is multiplied with int8 activations."""


class StoreWeights:
    """What a store's kernels compute with."""

    def __init__(self, decoded: DecodedStore) -> None:
        """Take a store whose shards are here."""
        self._decoded = decoded
        self.config = decoded.manifest.config

    def tensor(self, name: str) -> F64Array:
        """One tensor; StoreError if a unit of it is absent or damaged."""
        return self._decoded.whole(name).astype(np.float64)

    def rows(self, name: str) -> Iterator[F64Array]:
        """As `Weights`; raises as `tensor`."""
        for part in self._decoded.slices(name):
            yield part.values.astype(np.float64)

    def quantized(self, key: str, layer: int, expert: int = 0) -> bool:
        """As the manifest says."""
        return self._decoded.manifest.matrix_format(key, layer, expert).format.quantized


class SourceWeights:
    """A checkpoint's own weights, of which nothing is rounded."""

    _ROWS = 4096

    def __init__(self, source: Source) -> None:
        """Take an open checkpoint."""
        self._source = source
        self.config = source.config

    def tensor(self, name: str) -> F64Array:
        """One tensor."""
        return self._source.read(name).astype(np.float64)

    def rows(self, name: str) -> Iterator[F64Array]:
        """As `Weights`."""
        for first in range(0, self._source.shape(name)[0], self._ROWS):
            rows = slice(first, min(first + self._ROWS, self._source.shape(name)[0]))
            yield self._source.read(name, rows).astype(np.float64)

    def quantized(self, key: str, layer: int, expert: int = 0) -> bool:
        """Never."""
        del key, layer, expert
        return False


def read_by(x_TC: F64Array, quantized: bool) -> F64Array:
    """What weights really read of some vectors: themselves, or int8 values with a scale per 32."""
    if not quantized:
        return x_TC
    q_TC, scale_Tj, _ = reference.quantize(x_TC.astype(np.float32))
    return reference.dequantize(q_TC, scale_Tj, x_TC.shape[1])


def embed(weights: Weights, ids: Sequence[int]) -> F64Array:
    """The embeddings [T, D] of some tokens."""
    wanted, found, first = np.asarray(ids), np.empty((len(ids), weights.config.model_dim)), 0
    for part in weights.rows("embedding"):
        here = (wanted >= first) & (wanted < first + len(part))
        found[here] = part[wanted[here] - first]
        first += len(part)
    return found


def attention(weights: Weights, layer: int, x_TD: Array) -> F64Array:
    """What the attention of a layer adds to the residual x of a sequence's first T tokens, [T, D]."""
    config, prefix = weights.config, f"layers.{layer}."
    heads, kv_heads, head_dim, tokens = config.heads, config.kv_heads, config.head_dim, len(x_TD)
    normed_TD = reference.rmsnorm(x_TD, weights.tensor(prefix + "attention_norm"), float(config.eps))

    def project(key: str, count: int) -> F64Array:
        rows_TR = read_by(normed_TD, weights.quantized(key, layer)) @ weights.tensor(prefix + key).T
        if config.attention_bias:
            rows_TR = rows_TR + weights.tensor(f"{prefix}{key}_bias")
        return rows_TR.reshape(tokens, count, head_dim)

    angles = reference.rope_angles(np.arange(tokens), config.inv_freq, float(config.attention_factor))
    q_THP, k_TGP, v_TGP = project("q", heads), project("k", kv_heads), project("v", kv_heads)
    q_THP = reference.rotate(reference.rmsnorm(q_THP, weights.tensor(prefix + "q_norm"), float(config.eps)), *angles)
    k_TGP = reference.rotate(reference.rmsnorm(k_TGP, weights.tensor(prefix + "k_norm"), float(config.eps)), *angles)
    kv_of_h = np.arange(heads, dtype=np.int32) // config.heads_per_kv_head
    scale = float(config.score_scale)
    attended_TC = np.stack(
        [reference.attention(q_THP[t], k_TGP[: t + 1], v_TGP[: t + 1], kv_of_h, scale).ravel() for t in range(tokens)]
    )
    out_TD = read_by(attended_TC, weights.quantized("o", layer)) @ weights.tensor(prefix + "o").T
    return np.asarray(out_TD + weights.tensor(prefix + "o_bias") if config.attention_bias else out_TD)


def mlp_norm(weights: Weights, layer: int, x_TD: Array) -> F64Array:
    """What router and experts of a layer read of the residual, [T, D]."""
    return reference.rmsnorm(x_TD, weights.tensor(f"layers.{layer}.mlp_norm"), float(weights.config.eps))


def router(weights: Weights, layer: int, normed_TD: F64Array) -> F64Array:
    """The logits of the experts, [T, E]; routers are never quantized."""
    return np.asarray(normed_TD @ weights.tensor(f"layers.{layer}.router").T)


def expert(weights: Weights, layer: int, number: int, normed_TD: F64Array) -> F64Array:
    """One expert's output [T, D]; a dense MLP is expert 0."""
    prefix = f"layers.{layer}.experts.{number}."
    x_TD = read_by(normed_TD, weights.quantized("gate", layer, number))
    hidden_TF = reference.hidden_units(x_TD, weights.tensor(prefix + "gate"), weights.tensor(prefix + "up"))
    hidden_TF = read_by(hidden_TF, weights.quantized("down", layer, number))
    return np.asarray(hidden_TF @ weights.tensor(prefix + "down").T)


def mixture(weights: Weights, layer: int, normed_TD: F64Array, ids_TK: I32Array, weights_TK: Array) -> F64Array:
    """The weighted sum over each token's experts, [T, D]."""
    out_TD = np.zeros(normed_TD.shape)
    for number in np.unique(ids_TK).tolist():
        tokens, places = np.nonzero(ids_TK == number)
        out_TD[tokens] += weights_TK[tokens, places, None] * expert(weights, layer, number, normed_TD[tokens])
    return out_TD


def logits(weights: Weights, x_TD: Array) -> F64Array:
    """The logits [T, V] of residuals after the last layer."""
    normed_TD = reference.rmsnorm(x_TD, weights.tensor("final_norm"), float(weights.config.eps))
    read_TD = read_by(normed_TD, weights.quantized("lm_head", 0))
    return np.concatenate([read_TD @ part.T for part in weights.rows("lm_head")], axis=1)
