"""No orphan and no endless start: a rank dies with its launcher, and a job whose MPI does not start ends itself."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from dist_moe.parallel.launcher import Launcher, detect_launcher
from dist_moe.parallel.mpi import end_from_thread, running_mpi, say, tell_launcher

STALLED = 75

_PR_SET_PDEATHSIG = 1
_LAUNCHER_PROGRAMS = ("hydra_pmi_proxy", "prted", "prterun", "orted", "mpirun", "mpiexec", "mpiexec.hydra")
_ANSWERS_WITHIN_S = 1.0
# Until the launcher has passed a line on, and, if told to, has ended this process.
_FORWARD_S = 0.5
# Later ranks give earlier ones this long to print the same line and to end the job.
_STAGGER_S = 1.5
_LONGEST_STAGGER_S = 4.5


def hold_lifeline(launcher: Launcher, environ: Mapping[str, str]) -> None:
    """Let this process die as soon as its launcher does, which Hydra and prterun, when killed, do not see to.

    The kernel kills it with its parent; where a script stands between the two, a thread waits for the launcher's end.

    Args:
        launcher: What started this process.
        environ: The launcher's environment.
    """
    if launcher.name not in ("mpich", "openmpi"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    program = _launcher_process()
    if program is None and _launcher_is_gone(environ):
        os.kill(os.getpid(), signal.SIGKILL)  # it died before the kernel was asked
    if program is None or program == os.getppid():
        return
    with contextlib.suppress(OSError):
        handle = os.pidfd_open(program)
        threading.Thread(target=_die_with, args=(handle,), name="lifeline", daemon=True).start()


def _launcher_is_gone(environ: Mapping[str, str]) -> bool:
    """Whether Hydra has hung up, or nobody listens where prterun did; False where that cannot be known."""
    if (hydra_fd := environ.get("PMI_FD", "")).isdecimal():
        poll = select.poll()
        poll.register(int(hydra_fd), 0)
        return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))
    servers = [value for name, value in environ.items() if name.startswith("PMIX_SERVER_URI")]
    place = re.search(r";tcp4://([0-9.]+):([0-9]+)", servers[0]) if servers else None
    if place is None:
        return False
    try:
        socket.create_connection((place[1], int(place[2])), _ANSWERS_WITHIN_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _die_with(handle: int) -> None:
    """Wait for a process's end, then end this one."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    while not poll.poll():
        continue
    os.kill(os.getpid(), signal.SIGKILL)


def _launcher_process() -> int | None:
    """The nearest ancestor that is an MPI launcher; None if this cannot be seen."""
    pid = os.getppid()
    while pid > 0:
        fields = _status(pid)
        if fields.get("Name") in _LAUNCHER_PROGRAMS:
            return pid
        pid = int(fields.get("PPid", "0"))
    return None


def stopped_ranks(launcher_pid: int | None) -> list[int]:
    """The ranks among a launcher's own children that are stopped (SIGSTOP, a debugger), as far as that can be seen."""
    ranks = []
    for directory in Path("/proc").glob("[0-9]*"):
        fields = _status(int(directory.name))
        if launcher_pid is None or fields.get("PPid") != str(launcher_pid) or fields.get("State", "")[:1] not in "Tt":
            continue
        with contextlib.suppress(OSError):
            entries = (directory / "environ").read_bytes().decode(errors="replace").split("\0")
            ranks.append(detect_launcher(dict(entry.split("=", 1) for entry in entries if "=" in entry)).rank)
    return sorted(ranks)


def _status(pid: int) -> dict[str, str]:
    """A process as the kernel describes it; empty if it is gone or hidden."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


@contextlib.contextmanager
def start_deadline(launcher: Launcher, timeout_s: float, environ: Mapping[str, str]) -> Iterator[None]:
    """End the whole job, with one line, if the block (the start of MPI) takes longer than `timeout_s`.

    Args:
        launcher: What started this process; without one there is nothing to wait for.
        timeout_s: Seconds.
        environ: The launcher's environment.
    """
    if launcher.name == "none":
        yield
        return
    started = threading.Event()

    def watch() -> None:
        stagger_s = min(launcher.rank * _STAGGER_S, _LONGEST_STAGGER_S)
        if not started.wait(timeout_s + stagger_s):
            _end_start(launcher, timeout_s, environ)

    threading.Thread(target=watch, name="start deadline", daemon=True).start()
    try:
        yield
    finally:
        started.set()


def _end_start(launcher: Launcher, timeout_s: float, environ: Mapping[str, str]) -> None:
    stopped = ", ".join(f"rank {rank} on this host is stopped" for rank in stopped_ranks(_launcher_process()))
    line = (
        f"rank {launcher.rank} on {socket.gethostname()}: MPI did not start within {timeout_s:g} s: some of the "
        f"{launcher.size or 'other'} ranks did not arrive "
        f"({stopped or 'stopped, its host is down, or a firewall is in the way'}); "
        "where starting takes long, raise --start-timeout"
    )
    mpi = running_mpi()
    if mpi is not None:
        end_from_thread(mpi, STALLED, line)
    say(line)
    tell_launcher(launcher, environ, STALLED)
    time.sleep(_FORWARD_S)
    os._exit(STALLED)
