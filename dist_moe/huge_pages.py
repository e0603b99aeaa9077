"""Memory in pages of 2 MB, where system and file system have them: reads need far fewer walks of the page table."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import numpy.typing as npt


def ask_for_huge_pages(mapped: mmap.mmap) -> None:
    """Let what is touched, or read from disk, from now on be mapped in huge pages, where that is possible."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)


def huge_page_memory(count: int) -> npt.NDArray[np.uint8]:
    """Private memory in huge pages, uint8 [count] of zeros; a page takes room when it is first touched.

    Raises:
        MemoryError: The system gives no address space of that size.
    """
    try:
        # Python's default, MAP_SHARED, would be shared memory, which has no huge pages as a rule.
        memory = mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{count} bytes: {error.strerror}") from None
    ask_for_huge_pages(memory)
    return np.frombuffer(memory, np.uint8)
