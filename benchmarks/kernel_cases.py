"""The kernels that matmul.py measures, on random data in the shapes of the 30B and 235B, and what is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dist_moe.kernels import (
    NO_FAULT,
    ChunkFormat,
    ChunkFormats,
    ChunkList,
    Kernels,
    KvFormat,
    KvView,
    MatrixFormat,
    MatrixList,
    Operand,
    WeightFormat,
    address_of,
    aligned_empty,
    kv_block_bytes,
    packed_bytes,
    reference,
)
from dist_moe.model_config import chunk_width

SAMPLE_ROWS = 256  # of a matrix whose error is measured; the rest is copies of them


@dataclass(frozen=True)
class Model:
    """The sizes that shapes come from."""

    name: str
    model_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    expert_hidden: int
    vocabulary: int


MODELS = (
    Model("30b", 2048, 32, 4, 128, 128, 768, 151936),
    Model("235b", 4096, 64, 4, 128, 128, 1536, 151936),
)


@dataclass(frozen=True)
class Case:
    """A kernel on data that is ready.

    Attributes:
        run: One timed pass over all copies.
        data: What it reads, for the reading loop.
        pass_bytes: Of that, what one pass reads.
        operations: Of one pass.
        outputs: After a pass: found, float64 of what was read, float64 before rounding.
    """

    kernel: str
    shape: str
    format: str
    run: Callable[[], None]
    data: np.ndarray
    pass_bytes: int
    operations: float
    outputs: Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray]]


class Maker:
    """Makes the cases of one model at one ISA level."""

    def __init__(self, kernels: Kernels, model: Model, fill_bytes: int) -> None:
        """Random numbers are the same for every level."""
        self.kernels, self.model, self.fill_bytes = kernels, model, fill_bytes
        self.rng = np.random.default_rng(7)

    def matrices(self, label: str, tokens: int) -> Iterator[Case]:
        """q, k and v together, the router (f32), and lm_head."""
        model, fmt = self.model, parse_format(label)
        dim = model.model_dim
        yield self._matmul("matmul qkv", (model.heads + 2 * model.kv_heads) * model.head_dim, dim, fmt, tokens)
        yield self._matmul("matmul lm_head", model.vocabulary, dim, fmt, tokens)
        if fmt.format == WeightFormat.F32:
            yield self._matmul("matmul router", model.experts, dim, fmt, tokens)

    def _matmul(self, name: str, rows: int, columns: int, fmt: MatrixFormat, tokens: int) -> Case:
        packed, weights_RC = self._random_matrix(rows, columns, fmt)
        data = self._copies(packed)
        operand, x_TC = self._operand(tokens, columns, fmt)
        out_TR = aligned_empty((tokens, rows), np.float32)
        lists = [MatrixList([(part, rows, 0, fmt)]) for part in data]

        def run() -> None:
            for matrices in lists:
                self.kernels.matmul(out_TR, matrices, operand, tokens)

        def outputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            sample = len(weights_RC)
            read_RC = unpacked(packed[: packed_bytes(fmt.format, sample, columns, fmt.group)], weights_RC.shape, fmt)
            return out_TR[:, :sample], values(operand) @ read_RC.T, x_TC.astype(np.float64) @ weights_RC.T

        operations = 2.0 * rows * columns * tokens * len(data)
        return Case(name, f"{rows}x{columns}", label_of(fmt), run, data, data.nbytes, operations, outputs)

    def heads(self, label: str, tokens: int) -> Iterator[Case]:
        """o_proj: exact sums over heads."""
        model, fmt = self.model, parse_format(label)
        dim, width = model.model_dim, model.head_dim
        parts = [self._random_matrix(dim, width, fmt) for _ in range(model.heads)]
        data = self._copies(np.concatenate([packed for packed, _ in parts]))
        operand, x_TC = self._operand(tokens, model.heads * width, fmt)
        sums_TD, fault_T = aligned_empty((tokens, dim), np.int64), np.full(tokens, NO_FAULT, np.int32)
        lists = [MatrixList([(unit, dim, 0, fmt) for unit in part.reshape(model.heads, -1)]) for part in data]

        def run() -> None:
            for units in lists:
                self.kernels.unit_sums(sums_TD, fault_T, units, operand, tokens, width, 0)

        def outputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            sample = len(parts[0][1])
            size = packed_bytes(fmt.format, sample, width, fmt.group)
            read_RC = np.concatenate([unpacked(packed[:size], (sample, width), fmt) for packed, _ in parts], axis=1)
            exact_RC = np.concatenate([weights_RC for _, weights_RC in parts], axis=1)
            found = sums_TD[:, :sample] * 2.0**-32
            return found, values(operand) @ read_RC.T, x_TC.astype(np.float64) @ exact_RC.T

        operations = 2.0 * dim * model.heads * width * tokens * len(data)
        shape = f"{model.heads} x {dim}x{width}"
        yield Case("sums over heads", shape, label_of(fmt), run, data, data.nbytes, operations, outputs)

    def experts(self, label: str, tokens: int) -> Iterator[Case]:
        """Expert chunks that all serve every token."""
        model, fmt = self.model, parse_format(label)
        dim, width = model.model_dim, chunk_width(model.expert_hidden, fmt.group)
        shapes = ((width, dim), (width, dim), (dim, width))
        exact = [self._floats(*shape) * np.float32(shape[1] ** -0.5) for shape in shapes]
        packed = [self._pack(weights, fmt) for weights in exact]
        data = self._copies(np.concatenate(packed))
        operand, x_TC = self._operand(tokens, dim, fmt)
        chunks, count = ChunkList(len(data)), np.full(len(data), tokens)
        addresses = np.array([address_of(chunk) for chunk in data], np.uint64)
        chunks.set(addresses, ChunkFormats([ChunkFormat(fmt, fmt)]), np.zeros(len(data), np.int64), count)
        token_N, weight_N = np.arange(tokens, dtype=np.int32), np.ones(tokens, np.float32)
        sums_TD, fault_T = aligned_empty((tokens, dim), np.int64), np.full(tokens, NO_FAULT, np.int32)

        def run() -> None:
            self.kernels.experts(
                sums_TD, fault_T, chunks, len(data), token_N, weight_N, operand, tokens, width, 0
            )  # fmt: skip

        def outputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            read = [unpacked(part, shape, fmt) for part, shape in zip(packed, shapes, strict=True)]
            int8 = fmt.format.quantized
            wanted = reference.expert_chunk(values(operand), *read, weight_N.astype(np.float64), int8)
            plain = [weights.astype(np.float64) for weights in exact]
            unrounded = reference.expert_chunk(x_TC.astype(np.float64), *plain, weight_N.astype(np.float64), False)
            return sums_TD * 2.0**-32 / len(data), wanted, unrounded

        operations = 6.0 * dim * width * tokens * len(data)
        yield Case("expert chunks", f"{width} of {dim}", label_of(fmt), run, data, data.nbytes, operations, outputs)

    def attention(self, label: str, tokens: int, depth: int) -> Case:
        """The last tokens of a sequence over its cache; a copy of the cache for each layer."""
        model, fmt = self.model, KvFormat.parse(label)
        heads, kv_heads, width = model.heads, model.kv_heads, model.head_dim
        depth = max(depth, tokens)
        layer_bytes, block_count = kv_heads * kv_block_bytes(fmt, width), -(-depth // 64)
        rows_SR = self._floats(depth, (heads + 2 * kv_heads) * width)
        first = aligned_empty((block_count, layer_bytes), np.uint8)
        fault_S = np.full(depth, NO_FAULT, np.int32)
        view = KvView(list(first), np.zeros(depth, np.int64), np.arange(depth), 0, fmt)
        self.kernels.kv_store(view, fault_S, rows_SR, heads * width, (heads + kv_heads) * width, kv_heads, width, 0)
        data = self._copies(first.ravel())
        position_T = np.arange(depth - tokens, depth)
        views = [
            KvView(list(part.reshape(block_count, -1)), np.zeros(tokens, np.int64), position_T, 0, fmt) for part in data
        ]
        q_TR = np.ascontiguousarray(rows_SR[depth - tokens :])
        out_TC, fault_T = np.empty((tokens, heads * width), np.float32), np.full(tokens, NO_FAULT, np.int32)
        kv_of_h, scale = np.arange(heads, dtype=np.int32) // (heads // kv_heads), np.float32(width**-0.5)

        def run() -> None:
            for each in views:
                self.kernels.attention(out_TC, fault_T, q_TR, each, kv_of_h, scale, kv_heads, width, 0)

        def outputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            q, k, v = split_rows(rows_SR, model)
            query = KvFormat.Q8 if fmt == KvFormat.Q8 else KvFormat.F32
            rounded = (reference.narrow(q[-1:], query), reference.narrow(k, fmt), reference.narrow(v, fmt))
            exact = (q[-1:].astype(np.float64), k.astype(np.float64), v.astype(np.float64))
            wanted, unrounded = (
                reference.attention(last[0], keys, their_values, kv_of_h, float(scale)).ravel()
                for last, keys, their_values in (rounded, exact)
            )
            return out_TC[-1], wanted, unrounded

        operations = 4.0 * heads * width * float((position_T + 1).sum()) * len(data)
        shape = f"{heads}/{kv_heads} heads, {depth} positions"
        return Case("attention", shape, label, run, data, data.nbytes, operations, outputs)

    def _floats(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape, dtype=np.float32)

    def _pack(self, weights_RC: np.ndarray, fmt: MatrixFormat) -> np.ndarray:
        packed = aligned_empty(packed_bytes(fmt.format, *weights_RC.shape, fmt.group), np.uint8)
        assert self.kernels.pack(packed, weights_RC, None, fmt.format, fmt.group) == 0
        return packed

    def _random_matrix(self, rows: int, columns: int, fmt: MatrixFormat) -> tuple[np.ndarray, np.ndarray]:
        """A packed matrix, and the values of its first rows; the rest repeats them (tiles of 16 rows stand alone)."""
        weights_RC = self._floats(min(rows, SAMPLE_ROWS), columns)
        sample = self._pack(weights_RC, fmt)
        return np.resize(sample, packed_bytes(fmt.format, rows, columns, fmt.group)), weights_RC

    def _copies(self, packed: np.ndarray) -> np.ndarray:
        """As many copies as fill the memory that is to be read, uint8 [n, bytes], on 64-byte boundaries."""
        copies = aligned_empty((max(1, self.fill_bytes // len(packed)), len(packed)), np.uint8)
        copies[:] = packed
        return copies

    def _operand(self, tokens: int, columns: int, fmt: MatrixFormat) -> tuple[Operand, np.ndarray]:
        operand = Operand(tokens, columns, quantized=fmt.format.quantized)
        operand.x_TC[:] = x_TC = self._floats(tokens, columns)
        self.kernels.quantize(operand, np.full(tokens, NO_FAULT, np.int32), tokens, 0)
        return operand, x_TC


def split_rows(rows_SR: np.ndarray, model: Model) -> list[np.ndarray]:
    """Q, K and V [S, heads, P]."""
    ends = [model.heads * model.head_dim, (model.heads + model.kv_heads) * model.head_dim]
    parts = np.split(rows_SR, ends, axis=1)
    return [np.ascontiguousarray(part).reshape(len(rows_SR), -1, model.head_dim) for part in parts]


def parse_format(label: str) -> MatrixFormat:
    """`q4/32` is q4 in groups of 32, `q4/0` in whole rows."""
    name, _, group = label.partition("/")
    return MatrixFormat(WeightFormat.parse(name), int(group or 0))


def label_of(fmt: MatrixFormat) -> str:
    """The inverse."""
    return f"{fmt.format.label}/{fmt.group}" if fmt.format.quantized else fmt.format.label


def unpacked(packed: np.ndarray, shape: tuple[int, int], fmt: MatrixFormat) -> np.ndarray:
    """What the kernels read, from the definition of the bytes."""
    return reference.unpack_matrix(packed, *shape, fmt.format, fmt.group)


def values(operand: Operand) -> np.ndarray:
    """What weights are multiplied with."""
    if operand.quantized:
        return reference.dequantize(operand.q_TC, operand.scale_TG, operand.columns)
    return operand.x_TC.astype(np.float64)
