"""Who we are under a launcher, read from its environment alone: --help and usage errors print once without MPI."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launcher:
    """The launcher of this process and this process's place in the job, as its environment variables say.

    Attributes:
        name: "none" (a plain process), "mpich" (Hydra: MPICH, Intel MPI), "openmpi" (prterun), "slurm", "flux", "pals"
            or "pmix".
        rank: 0 when the launcher does not say.
        size: Number of ranks; 0 when the launcher does not say.
        local_size: Ranks on this host; 0 when the launcher does not say.
    """

    name: str = "none"
    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints what all ranks would print alike."""
        return self.rank == 0


@dataclass(frozen=True)
class _Dialect:
    """One launcher's variables. The process belongs to it when one of `marks` is set."""

    name: str
    marks: tuple[str, ...]
    rank: str
    size: str
    local_size: str = ""


# The order matters: mpirun inside a Slurm job starts its proxies through srun, whose variables the ranks inherit, and
# srun --mpi=pmi2 and --mpi=pmix set PMI_* and PMIX_* themselves.
_DIALECTS = (
    _Dialect(
        "openmpi",
        ("OMPI_COMM_WORLD_SIZE",),
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Dialect("mpich", ("HYDI_CONTROL_FD", "MPI_LOCALNRANKS"), "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
    _Dialect("pals", ("PALS_RANKID",), "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_SIZE"),
    _Dialect("flux", ("FLUX_TASK_RANK",), "FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    _Dialect("slurm", ("SLURM_STEP_NUM_TASKS",), "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
    _Dialect("mpich", ("PMI_SIZE", "PMI_RANK"), "PMI_RANK", "PMI_SIZE"),
    _Dialect("pmix", ("PMIX_RANK",), "PMIX_RANK", "PMIX_SIZE"),
)


def detect_launcher(environ: Mapping[str, str]) -> Launcher:
    """Read the launcher's variables; does not start or import MPI.

    Args:
        environ: The process environment, `os.environ` outside tests.

    Source: the environments that Hydra 5.0, prterun 5.0, srun, flux and PALS give their processes.
    """
    for dialect in _DIALECTS:
        if not any(mark in environ for mark in dialect.marks):
            continue
        size = _number(environ.get(dialect.size))
        rank = _number(environ.get(dialect.rank))
        # srun writes "4(x2),3": only an unambiguous single figure is used, else every rank could be here.
        local_size = _number(environ.get(dialect.local_size)) or (1 if size == 1 else 0)
        return Launcher(dialect.name, rank, size, local_size)
    return Launcher()


def _number(text: str | None) -> int:
    """The non-negative decimal number that `text` is, or 0."""
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,9}", text) else 0
