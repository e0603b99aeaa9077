"""Kernels on packed weights, with their float64 definitions: packing, products, sums over heads, expert chunks.

Legend: T tokens, C columns, R rows, D model dim, P head dim, F hidden units of a chunk, u units.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dist_moe.kernels import ChunkFormat, Kernels, MatrixFormat, Operand, WeightFormat, packed_bytes, reference
from dist_moe.kernels.arrays import F64Array
from dist_moe.verify.calls import (
    Chunk,
    Packed,
    chunk_sums,
    multiply,
    operand_of,
    pack,
    pack_chunk,
    unit_sums,
)
from dist_moe.verify.check import Arrays
from dist_moe.verify.family import ROUNDING, Family, Random

FORMATS = (
    MatrixFormat(WeightFormat.F32, 0),
    MatrixFormat(WeightFormat.BF16, 0),
    *(MatrixFormat(fmt, group) for fmt in (WeightFormat.Q8, WeightFormat.Q4) for group in (32, 64, 128, 0)),
)
# What `shard --recipe` mixes inside an expert: int8 and f32 operands, wide and narrow groups.
MIXED = (
    ChunkFormat(MatrixFormat(WeightFormat.Q4, 32), MatrixFormat(WeightFormat.Q8, 128)),
    ChunkFormat(MatrixFormat(WeightFormat.Q8, 64), MatrixFormat(WeightFormat.BF16, 0)),
    ChunkFormat(MatrixFormat(WeightFormat.F32, 0), MatrixFormat(WeightFormat.Q4, 32)),
)
_T, _R, _C, _D, _P, _F, _UNITS = 7, 49, 160, 80, 128, 128, 3


def matrix_families(portable: Kernels) -> Iterator[Family]:
    """Every family for every format, packed by the portable level."""
    for fmt in FORMATS:
        yield _packing(fmt)
        yield _matmul(portable, fmt)
        yield _unit_sums(portable, fmt)
        yield _experts(label_of(fmt), portable, ChunkFormat(fmt, fmt))
    for mixed in MIXED:
        yield _experts(f"{label_of(mixed.gate_up)} and {label_of(mixed.down)}", portable, mixed)


def label_of(fmt: MatrixFormat) -> str:
    """For people, and the seed of its numbers."""
    groups = f" groups of {fmt.group}" if fmt.group else " whole rows"
    return fmt.format.label + (groups if fmt.format.quantized else "")


def values_of(matrix: Packed) -> F64Array:
    """A packed matrix as numbers, by the definition of its bytes."""
    return reference.unpack_matrix(matrix.data, matrix.rows, matrix.columns, matrix.format.format, matrix.format.group)


def operand_values(operand: Operand) -> F64Array:
    """The numbers that weights are multiplied with."""
    if operand.quantized:
        return reference.dequantize(operand.q_TC, operand.scale_TG, operand.columns)
    return operand.x_TC.astype(np.float64)


def _packing(matrix_format: MatrixFormat) -> Family:
    fmt, group, label = matrix_format.format, matrix_format.group, label_of(matrix_format)
    weights_RC = Random(label).floats(_R, _C)

    def run(kernels: Kernels) -> Arrays:
        packed = pack(kernels, weights_RC, matrix_format)
        values_RC = np.full(weights_RC.shape, np.nan, np.float32)
        kernels.unpack(values_RC, packed.data, fmt, group)
        return (values_RC, packed.data)

    def define(found: Arrays) -> Arrays:
        rounded = weights_RC
        if fmt == WeightFormat.BF16:
            rounded = reference.bf16_to_f32(reference.f32_to_bf16(weights_RC))
        elif fmt.quantized:
            scale_RG = reference.weight_scales(weights_RC, fmt, group)
            rounded = reference.quantize_weights(weights_RC, scale_RG, fmt, group)[1].astype(np.float32)
        decoded = reference.unpack_matrix(found[1], _R, _C, fmt, group).astype(np.float32)
        return rounded, decoded

    return Family("pack and unpack", label, run, define, None, lambda found: (found[0], found[0]))


def _matmul(portable: Kernels, fmt: MatrixFormat) -> Family:
    label, quantized = label_of(fmt), fmt.format.quantized
    random = Random(label)
    x_TC, matrix = random.floats(_T, _C), pack(portable, random.floats(_R, _C), fmt)

    def define(_: Arrays) -> Arrays:
        return (operand_values(operand_of(portable, x_TC, quantized)) @ values_of(matrix).T,)

    return Family(
        "matmul",
        label,
        lambda kernels: (multiply(kernels, matrix, operand_of(kernels, x_TC, quantized)),),
        define,
        ROUNDING,
    )


def _unit_sums(portable: Kernels, fmt: MatrixFormat) -> Family:
    label, quantized = label_of(fmt), fmt.format.quantized
    random = Random(label)
    x_TC = random.floats(_T, _UNITS * _P)
    units = [pack(portable, random.floats(_D, _P, scale=0.1), fmt) for _ in range(_UNITS)]

    def define(_: Arrays) -> Arrays:
        x_TuP = operand_values(operand_of(portable, x_TC, quantized)).reshape(_T, _UNITS, _P)
        return (np.sum([x_TuP[:, u] @ values_of(unit).T for u, unit in enumerate(units)], axis=0),)

    return Family(
        "exact sums over heads",
        label,
        lambda kernels: (unit_sums(kernels, units, operand_of(kernels, x_TC, quantized)),),
        define,
        ROUNDING,
        lambda found: (found[0] * 2.0**-32,),
    )


def _experts(label: str, portable: Kernels, fmt: ChunkFormat) -> Family:
    random, quantized = Random(label), fmt.gate_up.format.quantized
    x_TD = random.floats(_T, _D)
    shapes = ((_F, _D), (_F, _D), (_D, _F))
    matrices = [[random.floats(*shape, scale=shape[1] ** -0.5) for shape in shapes] for _ in range(2)]
    chunks = [pack_chunk(portable, parts, fmt) for parts in matrices]
    tokens = [np.arange(_T, dtype=np.int32), np.array([1, 4], np.int32)]
    weights = [random.uniform(_T), random.uniform(2)]

    def run(kernels: Kernels) -> Arrays:
        return (chunk_sums(kernels, chunks, operand_of(kernels, x_TD, quantized), tokens, weights),)

    def define(_: Arrays) -> Arrays:
        x64_TD = operand_values(operand_of(portable, x_TD, quantized))
        sums_TD = np.zeros((_T, _D))
        for chunk, rows, weight in zip(chunks, tokens, weights, strict=True):
            gate_FD, up_FD, down_DF = chunk_values(chunk)
            sums_TD[rows] += reference.expert_chunk(
                x64_TD[rows], gate_FD, up_FD, down_DF, weight, fmt.down.format.quantized
            )
        return (sums_TD,)

    return Family("expert chunks", label, run, define, ROUNDING, lambda found: (found[0] * 2.0**-32,))


def chunk_values(chunk: Chunk) -> tuple[F64Array, F64Array, F64Array]:
    """Gate, up and down of a chunk of model dim D as numbers, by the definition of its bytes."""
    parts, at = [], 0
    gate_up, down = (chunk.width, _D, chunk.format.gate_up), (_D, chunk.width, chunk.format.down)
    for rows, columns, fmt in (gate_up, gate_up, down):
        size = packed_bytes(fmt.format, rows, columns, fmt.group)
        data = chunk.data[at : at + size]
        parts.append(reference.unpack_matrix(data, rows, columns, fmt.format, fmt.group))
        at += size
    return parts[0], parts[1], parts[2]
