"""What killed MPI jobs leave on a host: shared memory that no process maps, and ranks whose launcher is gone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dist_moe.parallel.cpu_limits import is_launcher

# Ours, MPICH's, and Open MPI's (two names).
_NAMES = ("dist-moe-*", "mpich_shm_*", "sm_segment.*", "vader_segment.*")
# A job that starts has made its memory but perhaps not mapped it yet.
_YOUNG_S = 60.0
_RANK_MARKS = (b"PMI_RANK=", b"PMIX_RANK=", b"OMPI_COMM_WORLD_RANK=")
_SHARED_MEMORY = Path("/dev/shm")
_PROC = Path("/proc")


@dataclass(frozen=True)
class Leftovers:
    """Files of this user that no process uses, with their bytes in all, and process ids of orphaned ranks."""

    files: tuple[str, ...] = ()
    file_bytes: int = 0
    orphans: tuple[int, ...] = ()


def find_leftovers(directory: Path = _SHARED_MEMORY, proc: Path = _PROC, young_s: float = _YOUNG_S) -> Leftovers:
    """Look for them.

    Args:
        directory: Where shared memory has its names.
        proc: Where procfs is.
        young_s: Files changed less than this ago are left alone.
    """
    found = {path: size for path, size in _own_files(directory) if _age_s(path) >= young_s}
    used = _used_files(proc, found) if found else set()
    stale = [path for path in found if str(path) not in used]
    return Leftovers(tuple(map(str, stale)), sum(found[path] for path in stale), tuple(_orphans(proc)))


def remove_files(leftovers: Leftovers) -> Leftovers:
    """Unlink the files; returns what could be removed."""
    removed = []
    for name in leftovers.files:
        with suppress(OSError):
            Path(name).unlink()
            removed.append(name)
    share = leftovers.file_bytes if len(removed) == len(leftovers.files) else 0
    return Leftovers(tuple(removed), share)


def _own_files(directory: Path) -> Iterator[tuple[Path, int]]:
    for pattern in _NAMES:
        for path in sorted(directory.glob(pattern)):
            with suppress(OSError):
                state = path.lstat()
                if state.st_uid == os.getuid() and path.is_file() and not path.is_symlink():
                    yield path, state.st_size


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _used_files(proc: Path, files: Iterable[Path]) -> set[str]:
    """Those of the files that some process has mapped or opened."""
    wanted, used = set(map(str, files)), set()
    for process in _processes(proc):
        with suppress(OSError):
            used |= {line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()} & wanted
        with suppress(OSError):
            for entry in (process / "fd").iterdir():
                with suppress(OSError):
                    used |= {str(entry.readlink())} & wanted
    return used


def _orphans(proc: Path) -> Iterator[int]:
    """Ranks of ours whose parent is the system's first process: their launcher died."""
    if is_launcher(1):  # in a container the launcher may be the first process
        return
    for process in _processes(proc):
        with suppress(OSError, ValueError, IndexError):
            if process.stat().st_uid != os.getuid() or b"dist" not in (command := _read(process / "cmdline")):
                continue
            parent = int(_read(process / "stat").rpartition(b")")[2].split()[1])
            ours = b"dist-moe" in command or b"dist_moe" in command
            if parent == 1 and ours and any(mark in _read(process / "environ") for mark in _RANK_MARKS):
                yield int(process.name)


def _processes(proc: Path) -> list[Path]:
    with suppress(OSError):
        return [entry for entry in proc.iterdir() if entry.name.isdecimal()]
    return []


def _read(path: Path) -> bytes:
    return path.read_bytes()
