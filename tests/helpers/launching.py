"""Run a command on several ranks with the mpirun of this environment, and never leave a process behind."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import dist_moe

# Open MPI refuses root, and more ranks than cores, unless told otherwise.
_OPENMPI_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@dataclass(frozen=True)
class Finished:
    """How a command ended: exit code, what it printed, and how long it took."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def output(self) -> str:
        """Everything it printed, for messages."""
        return f"exit code {self.code} after {self.seconds:.1f} s\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


@functools.cache
def mpirun_path() -> str:
    """The mpirun beside this Python, else the one on PATH; a missing one fails the test."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.fail("no mpirun beside this Python or on PATH: pip install 'dist-moe[mpich]' (tests need an MPI)")
    return found


@functools.cache
def flavour() -> str:
    """The MPI of `mpirun_path`: "mpich" or "openmpi"."""
    version = subprocess.run([mpirun_path(), "--version"], capture_output=True, text=True, check=False, timeout=30)
    return "openmpi" if "Open MPI" in version.stdout + version.stderr else "mpich"


def child_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment with this package importable, what Open MPI needs here, and `env` on top."""
    environ = dict(os.environ)
    home = str(Path(dist_moe.__file__).parents[1])
    helpers = str(Path(__file__).parents[1])
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [home, helpers, environ.get("PYTHONPATH")]))
    if flavour() == "openmpi":
        environ.update(_OPENMPI_ENVIRONMENT)
    return environ | dict(env or {})


def mpirun(
    ranks: int,
    *command: str,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 60,
    cwd: str | Path | None = None,
    stdin: int = subprocess.DEVNULL,
) -> Finished:
    """Run `mpirun -n ranks command`; after `timeout_s` all its processes are killed and the test fails."""
    return run(mpirun_path(), "-n", str(ranks), *command, env=env, timeout_s=timeout_s, cwd=cwd, stdin=stdin)


# Open MPI's launcher gives up now and then (1 of some hundred starts) before it has started anything of ours.
_NOT_STARTED = "The PMIx server's listener thread failed to start"


def run(
    *command: str,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 60,
    cwd: str | Path | None = None,
    stdin: int = subprocess.DEVNULL,
) -> Finished:
    """Run a command in its own session; after `timeout_s` it and all it started are killed and the test fails."""
    finished = _run_once(*command, env=env, timeout_s=timeout_s, cwd=cwd, stdin=stdin)
    if _NOT_STARTED in finished.stderr:
        finished = _run_once(*command, env=env, timeout_s=timeout_s, cwd=cwd, stdin=stdin)
    return finished


def _run_once(
    *command: str, env: Mapping[str, str] | None, timeout_s: float, cwd: str | Path | None, stdin: int
) -> Finished:
    # Files, not pipes: a process that outlives the command would keep a pipe open.
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        started_s = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env=child_environment(env),
            start_new_session=True,
        )
        try:
            process.wait(timeout_s)
            late = False
        except subprocess.TimeoutExpired:
            late = True
        finally:
            kill_tree(process)
        seconds = time.monotonic() - started_s
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read())
    finished = Finished(process.returncode, texts[0], texts[1], seconds)
    if late:
        pytest.fail(f"{' '.join(command)} did not end within {timeout_s} s: {finished.output}")
    return finished


def kill_tree(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Kill what is left of a command: its descendants (Hydra gives each rank a session of its own) and its session."""
    doomed: dict[int, psutil.Process] = {}
    if process.poll() is None:
        root = psutil.Process(process.pid)
        doomed = {child.pid: child for child in [root, *root.children(recursive=True)]}
    for other in psutil.process_iter():
        try:
            if os.getsid(other.pid) == process.pid:
                doomed[other.pid] = other
        except (ProcessLookupError, PermissionError):
            continue
    for victim in doomed.values():
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(30)
