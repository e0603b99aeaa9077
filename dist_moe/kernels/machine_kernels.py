"""How fast this machine reads and computes, as `dist-moe bench` compares with: the last chapter of dist_moe.h."""

from __future__ import annotations

from dist_moe.kernels.arrays import U8, U8Array
from dist_moe.kernels.context import Context
from dist_moe.kernels.formats import WeightFormat
from dist_moe.kernels.library import ffi, lib


class MachineKernels(Context):
    """The chapter "measuring the machine" of dist_moe.h; every method keeps all threads busy."""

    def read_seconds(self, data: U8Array, streams: int, ahead_bytes: int) -> tuple[float, int]:
        """Read uint8 [n] once, but for what is left over after steps of 256 bytes per stream.

        Args:
            data: What to read.
            streams: Runs that a thread reads side by side.
            ahead_bytes: How far before its use a line is prefetched; 0 is not at all.

        Returns:
            Seconds, and the xor of all int32 that were read.
        """
        seen = ffi.new("int32_t *")
        bytes_ = U8.read(data, len(data))
        seconds = lib.dm_read_seconds(self._context, seen, bytes_, len(data), streams, ahead_bytes)
        return float(seconds), int(seen[0])

    def int8_peak(self, rounds: int) -> float:
        """Operations per second of bare int8 dot products, a multiply-add being two; `rounds` sets the duration."""
        return float(lib.dm_int8_peak(self._context, rounds))

    def f32_peak(self, rounds: int) -> float:
        """Operations per second of bare f32 fused multiply-adds."""
        return float(lib.dm_f32_peak(self._context, rounds))

    def matmul_peak(self, rows: int, columns: int, tokens: int, fmt: WeightFormat, group: int, rounds: int) -> float:
        """Operations per second of this level's own matmul: each thread on a matrix [rows, columns] of its own."""
        return float(lib.dm_matmul_peak(self._context, rows, columns, tokens, fmt, group, rounds))
