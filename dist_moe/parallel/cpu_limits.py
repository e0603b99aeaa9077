"""Which cores this process may use, and which it could use if its launcher had not bound it; no MPI, Linux only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from dist_moe.parallel.launcher import Launcher

# The processes that start ranks and bind them: their own cores are what the user, or the batch system, gave the job.
# The kernel cuts names after 15 characters; none is longer.
_LAUNCHERS = "hydra_pmi_proxy mpirun mpiexec mpiexec.hydra prterun prted orterun orted slurmstepd srun flux-shell palsd"
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def own_cores() -> frozenset[int]:
    """The cores of this thread's affinity mask."""
    return frozenset(os.sched_getaffinity(0))


def cpuset_cores() -> frozenset[int]:
    """The cores that the cpuset of this process's cgroup allows, whatever its affinity mask says.

    The kernel cuts a mask of all cores down to the cpuset; the mask is put back at once.
    """
    before = own_cores()
    try:
        os.sched_setaffinity(0, range(_possible_cores()))
        return own_cores()
    except OSError:
        return before
    finally:
        os.sched_setaffinity(0, before)


def launcher_cores(launcher: Launcher) -> frozenset[int]:
    """The cores that the launcher has, and could have given to this rank; a plain process's own.

    A user's `taskset mpirun ...` is thus kept, and what the launcher does to each rank is not.
    """
    if launcher.name == "none":
        return own_cores()
    for process in _ancestors():
        if is_launcher(process):
            try:
                return (frozenset(os.sched_getaffinity(process)) & cpuset_cores()) | own_cores()
            except OSError:
                break
    return cpuset_cores()


def quota_cores(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """The whole cores' worth of time that the cgroup allows (`docker --cpus`, Kubernetes limits), or None."""
    quotas = [quota for group in _groups(proc, cgroups) if (quota := _quota(group)) is not None]
    return max(1, int(min(quotas))) if quotas else None


def is_launcher(process: int) -> bool:
    """Whether a process id is that of a program that starts ranks."""
    try:
        return (_PROC / str(process) / "comm").read_text().strip() in _LAUNCHERS.split()
    except OSError:
        return False


def host_cores() -> int:
    """The cores of this host that are online, allowed or not."""
    return os.cpu_count() or 1


def expected_threads(launcher: Launcher) -> int:
    """The threads of each rank as far as one can tell before MPI starts."""
    cores = expected_cores(launcher)
    return max(1, cores // max(1, launcher.local_size or launcher.size))


def expected_cores(launcher: Launcher) -> int:
    """The cores of this host's ranks together, as far as one can tell before MPI starts."""
    return limited(len(launcher_cores(launcher)), quota_cores())


def limited(cores: int, quota: int | None) -> int:
    """A number of cores, or the quota if that is less."""
    return cores if quota is None else min(cores, quota)


def _possible_cores() -> int:
    """One more than the highest core number."""
    try:
        numbers = re.findall(r"\d+", (Path("/sys/devices/system/cpu/possible")).read_text())
    except OSError:
        numbers = []
    return max([int(number) + 1 for number in numbers] + [host_cores()])


def _ancestors() -> Iterator[int]:
    """The parent's process id, its parent's, and so on."""
    process = os.getppid()
    while process > 1:
        yield process
        try:
            fields = (_PROC / str(process) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return
        process = int(fields[1])


def _groups(proc: Path, cgroups: Path) -> Iterator[Path]:
    """The directories of this process's cpu cgroup and of those above it; also the mounted root, as in a container."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        root = cgroups if number == "0" else cgroups / "cpu"
        group = root / path.lstrip("/")
        yield from (place for place in (group, *group.parents) if place == root or root in place.parents)


def _quota(group: Path) -> float | None:
    """Cores' worth of time in one cgroup: cpu.max (version 2), or cpu.cfs_* (version 1)."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return None if quota in ("max", "-1") else float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
