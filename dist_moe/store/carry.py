"""Weights that are quantized already: which of them a store keeps bit for bit, and what becomes of the others."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from dist_moe.checkpoint.source import Blocks, Source
from dist_moe.kernels.arrays import Array, U8Array
from dist_moe.kernels.formats import GROUP, WeightFormat
from dist_moe.kernels.packing import ZERO_CODES, pack_codes
from dist_moe.store.formats import ModelFormats
from dist_moe.store.units import output_group

# The smallest format that keeps every value of a source's type.
EXACT_FORMAT = {
    "q4_0": WeightFormat.Q4,
    "q8_0": WeightFormat.Q8,
    "bf16": WeightFormat.BF16,
    "f16": WeightFormat.F32,
    "f32": WeightFormat.F32,
}
# Types whose integers no store can keep: q8 where q4 would throw bits away.
_Q4_SOURCES = ("q4_1", "q4_k", "iq4_nl", "iq4_xs", "q2_k", "q3_k", "qw3w_q4", "qw3w_q4_zero_point")
_Q8_SOURCES = ("q5_0", "q5_1", "q5_k", "q6_k", "qw3w_q8")
NEAREST_FORMAT = dict.fromkeys(_Q4_SOURCES, WeightFormat.Q4) | dict.fromkeys(_Q8_SOURCES, WeightFormat.Q8)
DEFAULT_FORMAT = WeightFormat.Q4
_BITS = {"q4_0": 4, "q8_0": 8}
_SHOWN = 3  # matrices that a line of `conversion_notes` names


def default_format(source: Source) -> WeightFormat:
    """The format of a store when nobody asks for one: nearest to what the source has, q4 if it is not quantized yet."""
    dtype = source.preferred_dtype()
    return DEFAULT_FORMAT if dtype is None else (EXACT_FORMAT | NEAREST_FORMAT)[dtype]


def is_carried(source_dtype: str, fmt: WeightFormat, group_size: int) -> bool:
    """Whether matrices of a source's type keep their integers and scales in a store of this format."""
    if source_dtype not in _BITS or not fmt.quantized or group_size != GROUP:
        return False
    return _BITS[source_dtype] <= (4 if fmt == WeightFormat.Q4 else 8)


def pack_blocks(packed: U8Array, blocks: Blocks, fmt: WeightFormat, height: int) -> int:
    """Pack carried blocks; 4-bit values fit into q8 as they are.

    Args:
        packed: Receives the packed matrix.
        blocks: What the source has.
        fmt: Q4 or Q8.
        height: Rows to fill up to with zeros, if there are fewer.

    Returns:
        As `pack_codes`.
    """
    missing = max(0, height - len(blocks.scale_RG))
    # The kernels give rows of zeros this scale: 0 / -8 for q4.
    zero = np.float16(-0.0 if fmt == WeightFormat.Q4 else 0.0)
    scale_RG = np.pad(blocks.scale_RG, ((0, missing), (0, 0)), constant_values=zero)
    codes_RG = np.pad(_codes(blocks, fmt), ((0, missing), (0, 0), (0, 0)), constant_values=ZERO_CODES[fmt])
    return pack_codes(packed, scale_RG, codes_RG, fmt)


def _codes(blocks: Blocks, fmt: WeightFormat) -> Array:
    """The integers as `pack_codes` wants them."""
    if fmt == WeightFormat.Q4:
        return blocks.codes_RG
    if blocks.bits == 8:
        return blocks.codes_RG.view(np.uint8) ^ np.uint8(0x80)
    halves = (blocks.codes_RG & 15, blocks.codes_RG >> 4)
    return np.concatenate(halves, axis=2) + np.uint8(128 - 8)


def conversion_notes(source: Source, formats: ModelFormats) -> list[str]:
    """What becomes of each type of matrix in a source that has a format of its own, one line each; else nothing."""
    if source.preferred_dtype() is None:
        return []
    names = defaultdict(list)
    for name in matrices(source):
        dtype, own = source.source_dtype(name), formats.of_name(name)
        group = output_group(source.config, own.group) if name.endswith(".o") else own.group
        names[dtype, own.format, is_carried(dtype, own.format, group)].append(name)
    lines = []
    for (dtype, fmt, carried), found in sorted(names.items(), key=lambda item: -len(item[1])):
        listed = ", ".join(found[:_SHOWN]) + (" ..." if len(found) > _SHOWN else "")
        what = f"{len(found)} matrices of type {dtype.upper()} ({listed})"
        if carried:
            lines.append(f"{what}: integers and scales kept bit for bit as {fmt.label}")
        elif dtype in NEAREST_FORMAT and fmt != WeightFormat.F32:
            better = "" if fmt == WeightFormat.Q8 else ", --quant q8 loses less"
            lines.append(f"{what}: decoded exactly, then rounded to {fmt.label}; --quant f32 keeps every value{better}")
        elif fmt == WeightFormat.F32 or (dtype not in _BITS and fmt == EXACT_FORMAT[dtype]):
            lines.append(f"{what}: every value kept exactly as {fmt.label}")
        else:
            exact = EXACT_FORMAT[dtype].label + (f" --group-size {GROUP}" if dtype in _BITS else "")
            lines.append(f"{what}: rounded to {fmt.label}; --quant {exact} keeps every value")
    return lines


def matrices(source: Source) -> list[str]:
    """The matrices that a store keeps in its weight format, by their logical names."""
    return [
        name
        for name in source.names()
        if len(source.shape(name)) == 2 and name != "embedding" and not name.endswith(".router")
    ]
