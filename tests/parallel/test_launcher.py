"""Who we are under a launcher, from its environment alone, and the modes that MPI gets before it starts."""

from __future__ import annotations

import pytest

from dist_moe.parallel.launcher import Launcher, detect_launcher
from dist_moe.parallel.mpi import set_gentle_modes, short_version

HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_FD": "9", "MPI_LOCALNRANKS": "2", "HYDI_CONTROL_FD": "7"}
PRTERUN = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "2",
}
SRUN = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        ({"HOME": "/", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, Launcher()),  # a batch script, not started by srun
        (HYDRA, Launcher("mpich", 2, 4, 2)),
        (PRTERUN, Launcher("openmpi", 2, 4, 2)),
        ({"PMI_SIZE": "4"}, Launcher("mpich", 0, 4, 0)),
        (SRUN, Launcher("slurm", 2, 4, 0)),
        (SRUN | {"PMI_RANK": "2", "PMI_SIZE": "4"}, Launcher("slurm", 2, 4, 0)),
        # mpirun inside a Slurm job: the proxies' srun variables are inherited, one task per node.
        (HYDRA | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, Launcher("mpich", 2, 4, 2)),
        (PRTERUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, Launcher("openmpi", 2, 4, 2)),
        ({"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "3"}, Launcher("flux", 1, 3, 0)),
        ({"PALS_RANKID": "1", "PALS_LOCAL_SIZE": "3", "PMI_SIZE": "6"}, Launcher("pals", 1, 6, 3)),
        ({"PMIX_RANK": "1"}, Launcher("pmix", 1, 0, 0)),
        ({"PMI_SIZE": "four", "PMI_RANK": "-1"}, Launcher("mpich", 0, 0, 0)),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, Launcher("mpich", 0, 1, 1)),
    ],
)
def test_launchers_are_told_by_their_variables(environ: dict[str, str], launcher: Launcher) -> None:
    assert detect_launcher(environ) == launcher


@pytest.mark.parametrize(
    ("launcher", "threads", "cores", "wish", "gentle"),
    [
        (Launcher("mpich", 0, 4, 4), 1, 2, None, True),
        (Launcher("mpich", 0, 4, 4), 1, 4, None, False),
        (Launcher("mpich", 0, 4, 4), 2, 4, None, True),
        (Launcher("mpich", 0, 8, 2), 1, 2, None, False),  # 8 ranks, 2 of them here
        (Launcher("slurm", 0, 4, 0), 1, 2, None, True),  # how many are here is unknown: perhaps all
        (Launcher("mpich", 0, 1, 1), 8, 2, None, False),  # one rank waits for nobody
        (Launcher("mpich", 0, 4, 4), 1, 64, "1", True),
        (Launcher("mpich", 0, 4, 4), 1, 2, "0", False),
    ],
)
def test_waiting_is_gentle_when_ranks_share_cores(
    launcher: Launcher, threads: int, cores: int, wish: str | None, gentle: bool
) -> None:
    environ = {} if wish is None else {"DIST_MOE_YIELD": wish}
    assert set_gentle_modes(environ, launcher, threads, cores) is gentle
    assert (environ.get("MPIR_CVAR_POLLS_BEFORE_YIELD") == "1") is gentle
    assert (environ.get("OMPI_MCA_mpi_yield_when_idle") == "1") is gentle


def test_what_the_user_set_for_mpi_stays() -> None:
    environ = {"MPIR_CVAR_POLLS_BEFORE_YIELD": "77"}
    set_gentle_modes(environ, Launcher("mpich", 0, 4, 4), 1, 2)
    assert environ["MPIR_CVAR_POLLS_BEFORE_YIELD"] == "77"


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("MPICH Version:      5.0.2\nMPICH Release date: Fri", "MPICH 5.0.2"),
        ("Open MPI v5.0.11, package: Open MPI user@host Distribution", "Open MPI v5.0.11"),
        ("Intel(R) MPI Library 2021.13 for Linux* OS\n", "Intel(R) MPI Library 2021.13"),
    ],
)
def test_the_library_is_named_on_one_line(library: str, name: str) -> None:
    assert short_version(library) == name
