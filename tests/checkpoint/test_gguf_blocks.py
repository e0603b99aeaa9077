"""Quantized GGUF blocks against the definitions of ggml-quants.c, one weight at a time."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_moe.checkpoint.gguf_file import block_of, values_of
from dist_moe.checkpoint.source import open_source
from helpers.tiny_gguf import WIDE, random_blocks, write_gguf

F = np.float32
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def scale_and_min(scales: bytes, group: int) -> tuple[int, int]:
    """get_scale_min_k4: eight 6-bit scales and minima in twelve bytes."""
    if group < 4:
        return scales[group] & 63, scales[group + 4] & 63
    high = scales[group + 4]
    return (high & 15) | (scales[group - 4] >> 6) << 4, (high >> 4) | (scales[group] >> 6) << 4


def q4_or_q5(block: bytes, index: int, five: bool) -> F:
    """dequantize_row_q4_K and _q5_K."""
    d, dmin = (F(half) for half in struct.unpack_from("<2e", block))
    scale, least = scale_and_min(block[4:16], index // 32)
    high, low = (block[16:48], block[48:]) if five else (b"", block[16:])
    byte = low[index // 64 * 32 + index % 32]
    code = byte >> 4 if index // 32 % 2 else byte & 15
    if five:
        code += (high[index % 32] >> (index // 32) & 1) << 4
    return F(F(d * F(scale)) * F(code)) - F(dmin * F(least))


def q6(block: bytes, index: int) -> F:
    """dequantize_row_q6_K."""
    half, inner = divmod(index, 128)
    quarter, column = divmod(inner, 32)
    low = block[64 * half + 32 * (quarter % 2) + column]
    high = block[128 + 32 * half + column] >> (2 * quarter) & 3
    code = (low >> 4 if quarter > 1 else low & 15) | high << 4
    (scale,) = struct.unpack_from("<b", block, 192 + index // 16)
    (d,) = struct.unpack_from("<e", block, 208)
    return F(F(F(d) * F(scale)) * F(code - 32))


def q4_1(block: bytes, index: int) -> F:
    """dequantize_row_q4_1."""
    d, least = (F(half) for half in struct.unpack_from("<2e", block))
    byte = block[4 + index % 16]
    return F(F(d * F(byte >> 4 if index > 15 else byte & 15)) + least)


def iq4_nl(block: bytes, index: int) -> F:
    """dequantize_row_iq4_nl."""
    (d,) = struct.unpack_from("<e", block)
    byte = block[2 + index % 16]
    return F(F(d) * F(NONLINEAR[byte >> 4 if index > 15 else byte & 15]))


DEFINITIONS = {
    "Q4_1": q4_1,
    "IQ4_NL": iq4_nl,
    "Q4_K": lambda block, index: q4_or_q5(block, index, five=False),
    "Q5_K": lambda block, index: q4_or_q5(block, index, five=True),
    "Q6_K": q6,
}


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_every_weight_is_what_its_definition_says(kind: str) -> None:
    weights, block_bytes = block_of(kind)
    if kind == "Q4_1":
        data = np.random.default_rng(2).integers(0, 256, (3, 2 * block_bytes)).astype(np.uint8)
        for first in (0, block_bytes):
            data[:, first : first + 4] = np.array([0.37, -1.9], np.float16).view(np.uint8)
    else:
        data = random_blocks((3, 2 * weights), kind)
    found = values_of(data, kind)
    for row, values in zip(data, found, strict=True):
        for block in range(2):
            raw = row[block * block_bytes : (block + 1) * block_bytes].tobytes()
            expected = [DEFINITIONS[kind](raw, index) for index in range(weights)]
            assert np.array_equal(values[block * weights : (block + 1) * weights], np.array(expected, F))


def test_decoding_takes_little_more_memory_than_its_result() -> None:
    data = random_blocks((512, 2048), "Q6_K")
    tracemalloc.start()
    values = values_of(data, "Q6_K")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < values.nbytes + (4 << 20)


def test_one_expert_is_read_without_the_others(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", replace(WIDE, experts=24), "Q4_K")
    source = open_source(tmp_path / "m.gguf")
    tracemalloc.start()
    values = source.read("layers.0.experts.7.down")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 3 * values.nbytes
