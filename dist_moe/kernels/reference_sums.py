"""What the forms of sums on the wire hold, in NumPy: the specification of sums_packing.c and sums_wire.c."""

from __future__ import annotations

from typing import cast

import numpy as np

from dist_moe.kernels.arrays import Array, F32Array, I64Array, U8Array
from dist_moe.kernels.formats import GROUP
from dist_moe.kernels.reference import bf16_to_f32, f32_to_bf16

SUM_LIMIT = 1 << 51


def pack_sums(values: I64Array) -> bytes:
    """Per 32 values one byte w, the fewest bytes that hold all of them, then the w low bytes of each value."""
    packed = bytearray()
    for first in range(0, len(values), GROUP):
        block = [int(value) for value in values[first : first + GROUP]]
        width = max(0 if value == 0 else (value if value >= 0 else ~value).bit_length() // 8 + 1 for value in block)
        packed.append(width)
        for value in block:
            packed += value.to_bytes(8, "little", signed=True)[:width]
    return bytes(packed)


def finished_sums(sums: I64Array) -> F32Array:
    """What a sum becomes when it is used (rule 7): f32(f64(v) * 2^-32), where |v| < 2^51."""
    return (sums.astype(np.float64) * 2.0**-32).astype(np.float32)


def is_out_of_range(sums: I64Array) -> Array:
    """Whether a sum sets its token's fault (rule 15)."""
    return (sums >= SUM_LIMIT) | (sums <= -SUM_LIMIT)


def bf16_sums(sums: I64Array) -> I64Array:
    """The sums that bf16 numbers stand for, |v| < 2^51."""
    return _fixed(bf16_to_f32(f32_to_bf16(finished_sums(sums))))


def q8_sums(sums: I64Array) -> I64Array:
    """The sums that int8 numbers and a bf16 scale per 32 stand for, |v| < 2^51; an error of up to half a scale."""
    out = np.zeros_like(sums)
    for first in range(0, len(sums), GROUP):
        x = finished_sums(sums[first : first + GROUP])
        exact = np.array([np.abs(x).max() / np.float32(127)], np.float32)
        scale = bf16_to_f32(((exact.view(np.uint32) + 0xFFFF) >> 16).astype(np.uint16))[0]
        inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
        out[first : first + GROUP] = _fixed((np.rint(x * inverse) * scale).astype(np.float32))
    return out


def q8_scales(encoded: U8Array) -> F32Array:
    """The scales of whole blocks."""
    return bf16_to_f32(encoded.reshape(-1, 2 + GROUP)[:, :2].copy().view(np.uint16)[:, 0])


def _fixed(x: F32Array) -> I64Array:
    return cast("I64Array", np.rint(x.astype(np.float64) * 2.0**32).astype(np.int64))
