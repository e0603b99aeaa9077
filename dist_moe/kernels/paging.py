"""Which pages of a mapped file are in memory, and bringing them there before they are used."""

from __future__ import annotations

from dist_moe.kernels.library import ffi, lib


def absent_bytes(address: int, count: int) -> int:
    """Bytes of the pages around a run of mapped bytes that are not in memory; 0 where the system does not tell."""
    return int(lib.dm_absent_bytes(ffi.cast("void *", address), count))


def populate(address: int, count: int) -> int:
    """Read a run of mapped bytes into memory and into this process's page table; other threads run meanwhile.

    Returns:
        0, or an error number of the system: EFAULT where the file cannot be read.
    """
    return int(lib.dm_populate(ffi.cast("void *", address), count))
