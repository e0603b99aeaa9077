"""Which pages of a mapped file are in memory, and bringing them there before they are used."""

from __future__ import annotations

from dist_moe.kernels.library import ffi, lib


def is_absent(address: int, count: int, stride: int) -> bool:
    """Whether some page of a run of mapped bytes is not in memory; one in every `stride` bytes is looked at.

    False where the system does not tell, as to users who neither own the file nor may write it.
    """
    return bool(lib.dm_is_absent(ffi.cast("void *", address), count, stride))


def populate(address: int, count: int) -> int:
    """Read a run of mapped bytes into memory and into this process's page table; other threads run meanwhile.

    Returns:
        0, or an error number of the system: EFAULT where the file cannot be read.
    """
    return int(lib.dm_populate(ffi.cast("void *", address), count))
