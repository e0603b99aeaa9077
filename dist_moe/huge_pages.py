"""Memory in pages of 2 MB, where system and file system have them: reads need far fewer walks of the page table."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from collections.abc import Collection
from pathlib import Path

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


_SMAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ +(?P<path>/.*)")
_AMOUNT = re.compile(r"(?P<name>Rss|FilePmdMapped|ShmemPmdMapped): +(?P<kib>\d+) kB")


def huge_page_share(files: Collection[Path], smaps: Path = _SMAPS) -> float | None:
    """How much of these mapped files' pages that are in this process's table are huge, 0 to 1.

    None where the system does not tell, or none of them is mapped. Source: proc_pid_smaps(5).
    """
    wanted, mapped, kib = {str(path.resolve()) for path in files}, False, {"Rss": 0}
    try:
        lines = os.fsdecode(smaps.read_bytes()).split("\n")  # other line ends may stand in a path
    except OSError:
        return None
    for line in lines:
        if found := _AMOUNT.match(line):
            if mapped:
                kib[found["name"]] = kib.get(found["name"], 0) + int(found["kib"])
        elif found := _MAPPING.match(line):
            mapped = found["path"] in wanted
        elif "-" in line.partition(" ")[0]:  # a mapping without a file
            mapped = False
    resident_kib = kib.pop("Rss")
    return sum(kib.values()) / resident_kib if resident_kib and kib else None
