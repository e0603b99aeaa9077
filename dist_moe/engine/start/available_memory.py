"""How much memory this process may still take: what the host has, and what its cgroups leave."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "hugetlbfs")


@dataclass(frozen=True)
class AvailableMemory:
    """Bytes that can be taken without swapping, 0 if the system does not tell, and which limit is the tightest."""

    available_bytes: int
    limited_by: str


@dataclass(frozen=True)
class _CgroupFiles:
    """Names of a cgroup version's files, and of what memory.stat calls the page cache, which can be given back."""

    limit: str
    usage: str
    cache: tuple[str, str]


_VERSION_1 = _CgroupFiles(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
_VERSION_2 = _CgroupFiles("memory.max", "memory.current", ("inactive_file", "active_file"))


def available_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> AvailableMemory:
    """The least of the kernel's MemAvailable and of what every cgroup of this process leaves.

    Args:
        proc: Where procfs is.
        cgroups: Where the cgroup file systems are.
    """
    limits = [AvailableMemory(left, f"cgroup {name}") for name, left in _cgroup_limits(proc, cgroups)]
    host = _statistics(proc / "meminfo").get("MemAvailable:")
    if host is not None:
        limits.insert(0, AvailableMemory(host * 1024, "the host's memory"))
    return min(limits, key=lambda limit: limit.available_bytes, default=AvailableMemory(0, "unknown"))


def is_in_memory(path: Path, proc: Path = _PROC) -> bool:
    """Whether a file or directory lies on a file system that is itself memory, so that mapping it takes no more."""
    with suppress(OSError):
        device = path.stat().st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in (proc / "self" / "mountinfo").read_text().splitlines():
            fields, _, source = line.partition(" - ")
            if fields.split()[2] == wanted:
                return source.split()[0] in _MEMORY_FILE_SYSTEMS
    return False


def _cgroup_limits(proc: Path, cgroups: Path) -> Iterator[tuple[str, int]]:
    """(directory's name, bytes left) of each cgroup with a limit, from this process's own up to the root."""
    try:
        memberships = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else _unified(cgroups)
        files = _VERSION_1 if controllers else _VERSION_2
        # Inside a container the path may be the host's, and only the root is to be seen.
        own = root / path.strip("/")
        for directory in (own, *own.parents):
            if not directory.is_relative_to(root):
                break
            left = _left(directory, files)
            if left is not None:
                yield "/" + str(directory.relative_to(root)).lstrip("."), left


def _unified(cgroups: Path) -> Path:
    return cgroups / "unified" if (cgroups / "unified").is_dir() else cgroups


def _left(directory: Path, files: _CgroupFiles) -> int | None:
    """Bytes that a cgroup leaves, its own page cache counted as free; None without a limit."""
    try:
        limit_bytes = int((directory / files.limit).read_text())
        used_bytes = int((directory / files.usage).read_text())
    except (OSError, ValueError):  # "max" is no number; version 1 has a very large one instead
        return None
    statistics = _statistics(directory / "memory.stat")
    cache_bytes = sum(statistics.get(name, 0) for name in files.cache)
    return max(0, limit_bytes - used_bytes + cache_bytes)


def _statistics(path: Path) -> dict[str, int]:
    """Lines of "name number ..." as a dictionary; empty where there is no such file."""
    found = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, number, *_ = [*line.split(), "", ""]
            if number.isdecimal():
                found[name] = int(number)
    return found
