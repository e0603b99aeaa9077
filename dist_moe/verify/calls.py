"""Kernels on matrices of our own making: packed, multiplied, summed over units and over expert chunks.

Legend: T tokens, C columns, R rows, D model dim, P head dim, F hidden units of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_moe.kernels import (
    NO_FAULT,
    ChunkFormat,
    ChunkFormats,
    ChunkList,
    Kernels,
    MatrixFormat,
    MatrixList,
    Operand,
    address_of,
    aligned_empty,
    packed_bytes,
)
from dist_moe.kernels.arrays import F32Array, I32Array, I64Array, U8Array


@dataclass(frozen=True)
class Packed:
    """A packed matrix [rows, columns]."""

    data: U8Array
    rows: int
    columns: int
    format: MatrixFormat


@dataclass(frozen=True)
class Chunk:
    """An expert chunk: gate and up [F, D], down [D, F], packed back to back."""

    data: U8Array
    width: int
    format: ChunkFormat


def no_faults(tokens: int) -> I32Array:
    """No fault yet, for every token."""
    return np.full(tokens, NO_FAULT, np.int32)


def pack(kernels: Kernels, weights_RC: F32Array, fmt: MatrixFormat) -> Packed:
    """Quantize, if the format says so, and pack; every weight must be finite."""
    rows, columns = weights_RC.shape
    data = aligned_empty(packed_bytes(fmt.format, rows, columns, fmt.group), np.uint8)
    refused = kernels.pack(data, weights_RC, None, fmt.format, fmt.group)
    assert refused == 0
    return Packed(data, rows, columns, fmt)


def pack_chunk(kernels: Kernels, matrices: Sequence[F32Array], fmt: ChunkFormat) -> Chunk:
    """The chunk of gate, up and down."""
    formats = (fmt.gate_up, fmt.gate_up, fmt.down)
    parts = [pack(kernels, matrix, each).data for matrix, each in zip(matrices, formats, strict=True)]
    data = aligned_empty(sum(map(len, parts)), np.uint8)
    data[...] = np.concatenate(parts)
    return Chunk(data, matrices[0].shape[0], fmt)


def operand_of(kernels: Kernels, x_TC: F32Array, quantized: bool) -> Operand:
    """What weights are multiplied with."""
    operand = Operand(len(x_TC), x_TC.shape[1], quantized)
    operand.x_TC[...] = x_TC
    kernels.quantize(operand, no_faults(len(x_TC)), len(x_TC), 0)
    return operand


def multiply(kernels: Kernels, matrix: Packed, operand: Operand) -> F32Array:
    """The products [T, R] of a matrix with an operand's vectors."""
    out_TR = np.full((operand.max_tokens, matrix.rows), np.nan, np.float32)
    matrices = MatrixList([(matrix.data, matrix.rows, 0, matrix.format)])
    kernels.matmul(out_TR, matrices, operand, operand.max_tokens)
    return out_TR


def unit_sums(kernels: Kernels, units: Sequence[Packed], operand: Operand) -> I64Array:
    """The exact sums [T, D] over units, each [D, P] times its own P columns of the operand."""
    first, tokens = units[0], operand.max_tokens
    sums_TD = np.full((tokens, first.rows), -1, np.int64)
    matrices = MatrixList([(unit.data, unit.rows, 0, unit.format) for unit in units])
    fault_T = no_faults(tokens)
    kernels.unit_sums(sums_TD, fault_T, matrices, operand, tokens, first.columns, 0)
    return sums_TD


def chunk_sums(
    kernels: Kernels, chunks: Sequence[Chunk], operand: Operand, tokens: Sequence[I32Array], weights: Sequence[F32Array]
) -> I64Array:
    """The exact sums [T, D] over chunks, each for some of the operand's vectors with a weight each."""
    counts = np.array([len(rows) for rows in tokens], np.int64)
    listed = ChunkList(len(chunks))
    addresses = np.array([address_of(chunk.data) for chunk in chunks], np.uint64)
    formats = ChunkFormats([chunk.format for chunk in chunks])
    listed.set(addresses, formats, np.cumsum(counts) - counts, counts)
    sums_TD = np.full((operand.max_tokens, operand.columns), -1, np.int64)
    fault_T = no_faults(operand.max_tokens)
    kernels.experts(
        sums_TD,
        fault_T,
        listed,
        len(chunks),
        np.concatenate(tokens),
        np.concatenate(weights),
        operand,
        operand.max_tokens,
        chunks[0].width,
        0,
    )
    return sums_TD
