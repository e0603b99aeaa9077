"""Writes the weights of a store as a GGUF file, bit for bit, so that another engine runs the same numbers.

    python benchmarks/store_to_gguf.py STORE MODEL.gguf

The integers and f16 scales of q4 become Q4_0, those of q8 Q8_0; bf16, f32, embedding, norms and routers keep their
values. One tensor is in memory at a time. The file has no tokenizer: it is run with token ids. Needs the package gguf.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from dist_moe.errors import UsageError
from dist_moe.kernels import reference
from dist_moe.kernels.formats import GROUP, TILE_ROWS, WeightFormat, packed_bytes
from dist_moe.model_config import ModelConfig
from dist_moe.store.reader import Store

Bytes = npt.NDArray[np.uint8]
TYPES = {
    WeightFormat.Q4: GGMLQuantizationType.Q4_0,
    WeightFormat.Q8: GGMLQuantizationType.Q8_0,
    WeightFormat.BF16: GGMLQuantizationType.BF16,
    WeightFormat.F32: GGMLQuantizationType.F32,
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: its data are made when they are written."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # of the data: rows of quantized types count bytes
    make: Callable[[], npt.NDArray[np.generic]]


def blocks_of(packed: Bytes, rows: int, columns: int, fmt: WeightFormat) -> Bytes:
    """A packed matrix as GGUF's blocks: uint8 [rows, columns / 32, 18 for q4, 34 for q8, 64 for bf16, 128 for f32]."""
    tiles, groups = -(-rows // TILE_ROWS), columns // GROUP
    tile_bytes = packed.reshape(tiles, -1)
    if not fmt.quantized:
        words = packed.view(np.uint32 if fmt == WeightFormat.F32 else np.uint16).reshape(tiles, columns, TILE_ROWS)
        values = np.ascontiguousarray(words.swapaxes(1, 2)).reshape(tiles * TILE_ROWS, columns)[:rows]
        return values.view(np.uint8).reshape(rows, groups, -1)
    scales = tile_bytes[:, : groups * TILE_ROWS * 2].view(np.uint16).reshape(tiles, groups, TILE_ROWS)
    vectors = 4 if fmt == WeightFormat.Q4 else 8
    words = tile_bytes[:, -groups * vectors * 64 :].view(np.uint32).reshape(tiles, groups, vectors, TILE_ROWS)
    codes = np.ascontiguousarray(words.transpose(0, 3, 1, 2)).view(np.uint8).reshape(tiles * TILE_ROWS, groups, -1)
    if fmt == WeightFormat.Q8:
        codes = codes ^ np.uint8(0x80)
    scale_bytes = np.ascontiguousarray(scales.swapaxes(1, 2)).view(np.uint8).reshape(tiles * TILE_ROWS, groups, 2)
    return np.concatenate([scale_bytes, codes], axis=2)[:rows]


class StoreTensors:
    """The tensors of a store, put together from its units."""

    def __init__(self, store: Store) -> None:
        """Take an open store."""
        self.store, self.config = store, store.config

    def all(self) -> Iterator[Tensor]:
        """Every tensor, in the order of the file; UsageError if GGUF cannot hold its weights."""
        config = self.config
        yield self._embedding()
        yield self._vector("output_norm.weight", "final_norm")
        for layer in range(config.layers):
            yield from self._layer(layer)
        yield self._matrix("output.weight", "lm_head", 0, (config.vocabulary,), config.model_dim, self._vocabulary)

    def _embedding(self) -> Tensor:
        table = self.store.common("embedding")
        if table.dtype == np.float32:
            return Tensor("token_embd.weight", GGMLQuantizationType.F32, table.shape, lambda: table)
        data = table.view(np.uint8)
        return Tensor("token_embd.weight", GGMLQuantizationType.BF16, data.shape, lambda: data)

    def _layer(self, layer: int) -> Iterator[Tensor]:
        config, prefix, dim, head_dim = self.config, f"blk.{layer}.", self.config.model_dim, self.config.head_dim
        names = {
            "attn_norm": "attention_norm",
            "ffn_norm": "mlp_norm",
            "attn_q_norm": "q_norm",
            "attn_k_norm": "k_norm",
        }
        for theirs, ours in names.items():
            yield self._vector(f"{prefix}{theirs}.weight", f"layers.{layer}.{ours}")
        for name, kind, index, heads in (
            ("q", "head", 0, config.heads),
            ("k", "kv_head", 0, config.kv_heads),
            ("v", "kv_head", 1, config.kv_heads),
        ):
            rows = (heads * head_dim,)
            yield self._matrix(
                f"{prefix}attn_{name}.weight",
                name,
                layer,
                rows,
                dim,
                lambda kind=kind, index=index, heads=heads: np.concatenate(
                    [self._parts(kind, layer, head)[index] for head in range(heads)]
                ),
            )
        yield self._matrix(
            f"{prefix}attn_output.weight",
            "o",
            layer,
            (dim,),
            config.heads * head_dim,
            lambda: np.concatenate([self._parts("head", layer, head)[1] for head in range(config.heads)], axis=1),
        )
        hidden, experts = config.layer_hidden(layer), config.layer_experts(layer)
        suffix, leading = ("", ()) if config.is_dense(layer) else ("_exps", (experts,))
        if not config.is_dense(layer):
            yield self._router(layer)
        for index, (name, rows, columns) in enumerate(
            (("gate", hidden, dim), ("up", hidden, dim), ("down", dim, hidden))
        ):
            yield self._matrix(
                f"{prefix}ffn_{name}{suffix}.weight",
                name,
                layer,
                (*leading, rows),
                columns,
                lambda index=index: self._experts(layer, index),
            )

    def _vector(self, name: str, ours: str) -> Tensor:
        values = self.store.common(ours)
        return Tensor(name, GGMLQuantizationType.F32, values.shape, lambda: values)

    def _router(self, layer: int) -> Tensor:
        shape = (self.config.experts, self.config.model_dim)

        def make() -> npt.NDArray[np.float32]:
            packed = self.store.common(f"layers.{layer}.router")
            return reference.unpack_matrix(packed, *shape, self.store.manifest.router_format, 0).astype(np.float32)

        return Tensor(f"blk.{layer}.ffn_gate_inp.weight", GGMLQuantizationType.F32, shape, make)

    def _matrix(
        self, name: str, key: str, layer: int, rows: tuple[int, ...], columns: int, make: Callable[[], Bytes]
    ) -> Tensor:
        kind = TYPES[self._format(key, layer)]
        if kind == GGMLQuantizationType.F32:
            whole = (*rows, columns)
            return Tensor(name, kind, whole, lambda: make().reshape(-1).view(np.float32).reshape(whole))
        block_values, block_bytes = GGML_QUANT_SIZES[kind]
        shape = (*rows, columns // block_values * block_bytes)
        return Tensor(name, kind, shape, lambda: make().reshape(shape))

    def _format(self, key: str, layer: int) -> WeightFormat:
        """How a matrix is packed; all experts of a layer are alike, because they are one tensor."""
        experts = range(self.config.layer_experts(layer) if key in ("gate", "up", "down") else 1)
        first, *others = {self.store.manifest.matrix_format(key, layer, expert) for expert in experts}
        if others:
            raise UsageError(f"{self.store.directory}: the experts of layer {layer} have several formats; GGUF has one")
        if first.format.quantized and first.group != GROUP:
            raise UsageError(
                f"{self.store.directory}: has {first.format.label} weights in groups of {first.group}; expected "
                f"groups of {GROUP}, which GGUF has too: pack it with --group-size {GROUP}"
            )
        return first.format

    def _vocabulary(self) -> Bytes:
        units, fmt = range(len(self.store.unit_addresses("vocabulary", 0))), self._format("lm_head", 0)
        shape = (128, self.config.model_dim)
        blocks = [blocks_of(self.store.unit("vocabulary", 0, unit), *shape, fmt) for unit in units]
        return np.concatenate(blocks)[: self.config.vocabulary]

    def _parts(self, kind: str, layer: int, index: int) -> list[Bytes]:
        """The matrices of a head, kv_head or chunk unit."""
        dim, head_dim = self.config.model_dim, self.config.head_dim
        width = self.store.manifest.layer_chunk_width(layer)
        matrices = {
            "head": (("q", head_dim, dim), ("o", dim, head_dim)),
            "kv_head": (("k", head_dim, dim), ("v", head_dim, dim)),
            "chunk": (("gate", width, dim), ("up", width, dim), ("down", dim, width)),
        }[kind]
        unit, parts = self.store.unit(kind, layer, index), []  # type: ignore[arg-type]
        for key, rows, columns in matrices:
            fmt = self._format(key, layer)
            size = packed_bytes(fmt, rows, columns, GROUP)
            parts.append(blocks_of(unit[:size], rows, columns, fmt))
            unit = unit[size:]
        return parts

    def _experts(self, layer: int, index: int) -> Bytes:
        """One matrix (0 gate, 1 up, 2 down) of all experts of a layer, [E, rows, blocks, bytes of a block]."""
        chunks, axis = self.store.manifest.layer_chunks_per_expert(layer), 1 if index == 2 else 0
        return np.stack(
            [
                np.concatenate(
                    [self._parts("chunk", layer, expert * chunks + chunk)[index] for chunk in range(chunks)], axis=axis
                )
                for expert in range(self.config.layer_experts(layer))
            ]
        )


def add_metadata(writer: GGUFWriter, config: ModelConfig) -> None:
    """What llama.cpp must know of the architecture.

    Raises:
        UsageError: The model has what its Qwen3 lacks.
    """
    theta = rope_base(config)
    if config.attention_factor != 1 or config.attention_bias or 0 < len(config.dense_layers) < config.layers:
        raise UsageError("YaRN, attention biases and models with some dense layers are not written as GGUF here")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.model_dim)
    writer.add_feed_forward_length(config.dense_hidden or config.expert_hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(float(config.eps))
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(config.vocabulary)
    writer.add_tokenizer_model("none")
    if not config.dense_layers:
        writer.add_expert_count(config.experts)
        writer.add_expert_used_count(config.experts_per_token)
        writer.add_expert_feed_forward_length(config.expert_hidden)


def rope_base(config: ModelConfig) -> float:
    """The base of the rotary frequencies, which a store keeps as their values: the round number that gives them."""
    last = len(config.inv_freq) - 1
    exact = float(config.inv_freq[last]) ** (-len(config.inv_freq) / last)
    return float(f"{exact:.4g}")


def write_gguf(store: Store, path: Path) -> None:
    """Write the file; raises UsageError for a store that GGUF cannot hold bit for bit."""
    tensors = list(StoreTensors(store).all())
    writer = GGUFWriter(path, "qwen3" if store.config.dense_layers else "qwen3moe")
    add_metadata(writer, store.config)
    for tensor in tensors:
        dtype = np.dtype(np.float32 if tensor.type == GGMLQuantizationType.F32 else np.uint8)
        size = int(np.prod(tensor.shape, dtype=np.int64)) * dtype.itemsize
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, size, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(np.ascontiguousarray(tensor.make()))
    writer.close()


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    write_gguf(Store.open(arguments.store), arguments.file)


if __name__ == "__main__":
    main()
