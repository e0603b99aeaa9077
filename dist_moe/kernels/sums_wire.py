"""Exact sums as bytes for the network: packed without loss, as finished f32, or rounded (`--wire bf16|q8`)."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from dist_moe.kernels.arrays import I64, U8
from dist_moe.kernels.library import ffi, lib
from dist_moe.sum_bytes import BF16_SUM_BYTES, EXACT_SUM_BYTES, FINISHED_SUM_BYTES, Q8_SUM_BYTES

Sums = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class WireFormat(IntEnum):
    """How sums travel between hosts.

    EXACT is lossless. F32 is for finished sums only: what comes out is used as the same f32, with the same range fault.
    BF16 and Q8 are rounded.
    """

    EXACT = lib.DM_WIRE_EXACT
    F32 = lib.DM_WIRE_F32
    BF16 = lib.DM_WIRE_BF16
    Q8 = lib.DM_WIRE_Q8

    @property
    def label(self) -> str:
        """As `--wire` says it."""
        return self.name.lower()


def packed_bound(count: int) -> int:
    """Most bytes of `count` packed sums."""
    return int(lib.dm_packed_bound(count))


def pack_sums(out: Bytes, values: Sums) -> int:
    """Pack int64 values without loss.

    Args:
        out: uint8, C-contiguous, `packed_bound(values.size)` long or longer.
        values: int64, C-contiguous, any shape.

    Returns:
        The bytes used.
    """
    return encode_sums(out, values, WireFormat.EXACT)


def unpack_sums(sums: Sums, packed: Bytes, add: bool = False) -> int:
    """Unpack as many values as `sums` has, into it or onto it.

    Returns:
        The bytes read; 0 if these bytes are no packed sums of that count, whose values are undefined then.
    """
    return decode_sums(sums, packed, WireFormat.EXACT, add)


def wire_bound(count: int, wire: WireFormat) -> int:
    """Most bytes of `count` sums in this form."""
    return int(lib.dm_wire_bound(count, wire))


def encode_sums(out: Bytes, values: Sums, wire: WireFormat) -> int:
    """Like `pack_sums`, in any form; `out` has `wire_bound` bytes."""
    bound = lib.dm_wire_bound(values.size, wire)
    return int(lib.dm_encode_sums(U8.write(out, bound), I64.read(values, *values.shape), values.size, wire))


def decode_sums(sums: Sums, encoded: Bytes, wire: WireFormat, add: bool = False) -> int:
    """Like `unpack_sums`, from any form."""
    count = encoded.size
    return int(lib.dm_decode_sums(I64.whole(sums), ffi.from_buffer("uint8_t[]", encoded), count, sums.size, wire, add))


_VALUE_BYTES = {
    WireFormat.EXACT: EXACT_SUM_BYTES,
    WireFormat.F32: FINISHED_SUM_BYTES,
    WireFormat.BF16: BF16_SUM_BYTES,
    WireFormat.Q8: Q8_SUM_BYTES,
}


class SumsCodec:
    """One form of sums on the wire.

    Attributes:
        wire: Which one.
        rounds: Whether what comes out is used as another number than what went in.
        value_bytes: Bytes per sum, as a rule.
    """

    def __init__(self, wire: WireFormat) -> None:
        """Encode and decode in this form."""
        self.wire = wire
        self.rounds = wire in (WireFormat.BF16, WireFormat.Q8)
        self.value_bytes = _VALUE_BYTES[wire]

    def bound(self, count: int) -> int:
        """Most bytes of `count` sums."""
        return wire_bound(count, self.wire)

    def encode(self, out: Bytes, values: Sums) -> int:
        """Write the values' bytes and return how many."""
        return encode_sums(out, values, self.wire)

    def decode(self, sums: Sums, encoded: Bytes, add: bool = False) -> int:
        """Read sums, into or onto the array, and return the bytes read, 0 if they are damaged."""
        return decode_sums(sums, encoded, self.wire, add)
