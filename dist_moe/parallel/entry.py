"""How a job ends: the one wrapper around every command, so that no rank waits for one that has left.

Exit codes: 0; 1 our bug; 2 bad input; 3 environment or mismatch; 75 stall or lost peer; 130 interrupted (143 by
SIGTERM, 138 by SIGUSR1); 141 the reader of stdout is gone (as a shell reports SIGPIPE).
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import NoReturn

from dist_moe.errors import DistMoeError, Terminated
from dist_moe.parallel.last_words import LastWords
from dist_moe.parallel.launcher import Launcher, detect_launcher
from dist_moe.parallel.lifeline import hold_lifeline
from dist_moe.parallel.mpi import abort, running_mpi, tell_launcher
from dist_moe.parallel.world import UnfinishedStepError

_BUG = 1
_INTERRUPTED = 130
_PIPE_CLOSED = 141

# An error that all ranks meet is printed by the lowest one, which ends the others while they wait this long.
_START_GRACE_S = 10.0
_GRACE_S = 2.0
_GRACE_PER_RANK_S = 1.0
_LONGEST_STAGGER_S = 5.0


@dataclass(frozen=True)
class _Ending:
    """An exit code and the lines that explain it; `agreed` when all ranks are known to leave alike."""

    code: int
    lines: tuple[str, ...] = ()
    agreed: bool = False


def guarded(main: Callable[[], int], environ: Mapping[str, str] | None = None) -> int:
    """Run a command and end its job: the only way out of this package's programs.

    An `AgreedError` is printed once by rank 0 and all ranks leave alike after MPI_Finalize. Any other exception or
    SystemExit while other ranks run is printed with rank and host, and MPI_Abort ends them. Before MPI is up the first
    rank alone prints, and the launcher is told to end the job, so such an error on one rank ends all too.

    Args:
        main: The command; returns its exit code. It may start MPI (`World.start`) but never ends it.
        environ: The launcher's environment; `os.environ` when None.

    Returns:
        The exit code for `sys.exit`; MPI is finalized.
    """
    environ = os.environ if environ is None else environ
    launcher = detect_launcher(environ)
    hold_lifeline(launcher, environ)
    last_words = LastWords(launcher, environ)
    try:
        ending = _Ending(main(), agreed=True)
        sys.stdout.flush()
    except BaseException as error:
        ending = _explain(error, _place(launcher))
    last_words.spare()
    mpi = running_mpi()
    if mpi is None:
        return _leave_before_mpi(ending, launcher, environ)
    if mpi.COMM_WORLD.size == 1:
        _print(ending.lines if launcher.is_first else ())
        mpi.Finalize()
        # A wrong library makes every process a world of one: the others wait until the launcher's first has printed.
        return _leave_before_mpi(_Ending(ending.code), launcher, environ)
    if not ending.agreed:
        _abort(ending, mpi)
    if mpi.COMM_WORLD.rank == 0:
        _print(ending.lines)
    _finalize_together(mpi)
    return ending.code


def end_job(error: BaseException) -> NoReturn:
    """End all ranks of a running MPI because of an exception that this one alone is known to have met."""
    place = _place(detect_launcher(os.environ))
    ending = _explain(error, place)
    if ending.code == _BUG:  # of the script that uses this package
        lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
        summary = f"the script raised {type(error).__name__}: {error}".splitlines()[0]
        ending = _Ending(_BUG, (f"dist-moe: error{place}: {summary}", *lines))
    mpi = running_mpi()
    assert mpi is not None
    _abort(ending, mpi)


def _explain(error: BaseException, place: str) -> _Ending:
    """The ending that an exception asks for."""
    if isinstance(error, UnfinishedStepError):
        error = error.error
    if isinstance(error, DistMoeError):
        return _Ending(error.exit_code, _error_lines(error), error.agreed)
    if isinstance(error, KeyboardInterrupt):
        code = error.exit_code if isinstance(error, Terminated) else _INTERRUPTED
        return _Ending(code, ("dist-moe: interrupted",))
    if isinstance(error, BrokenPipeError) and not _stdout_is_open():
        return _Ending(_PIPE_CLOSED)
    if isinstance(error, SystemExit):
        return _explain_exit(error, place)
    if lacking := _lacking(error):
        return _Ending(DistMoeError.exit_code, (f"dist-moe: error{place}: {lacking}",))
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    summary = f"{type(error).__name__}: {error}".splitlines()[0]
    return _Ending(_BUG, (f"dist-moe: internal error{place}: {summary}", *lines))


def _lacking(error: BaseException) -> str:
    """What this host ran out of, if that is why: memory or room on a disk; else ""."""
    if isinstance(error, MemoryError):
        detail = f" ({error})" if str(error) else ""
        return f"out of memory{detail}: lower --ctx or --prefill-chunk, free memory, or start on more hosts"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: make room, or write to another disk"
    return ""


def _explain_exit(error: SystemExit, place: str) -> _Ending:
    """sys.exit: an exit code like a returned one before MPI is up, a mistake after (the other ranks would wait)."""
    code = error.code if isinstance(error.code, int) else int(error.code is not None)
    text = (f"dist-moe: error: {error.code}",) if isinstance(error.code, str) else ()
    if running_mpi() is None:
        return _Ending(code, text)
    left = f"dist-moe: internal error{place}: left with sys.exit({error.code!r}) while other ranks run"
    return _Ending(code or _BUG, (*text, left))


def _error_lines(error: DistMoeError) -> tuple[str, ...]:
    lines = tuple(f"dist-moe: error: {line}" for line in str(error).splitlines() or [type(error).__name__])
    if logging.getLogger("dist_moe").isEnabledFor(logging.DEBUG):
        lines += tuple("".join(traceback.format_exception(error)).rstrip().splitlines())
    return lines


def _place(launcher: Launcher) -> str:
    return "" if launcher.name == "none" else f" on rank {launcher.rank} ({socket.gethostname()})"


def _leave_before_mpi(ending: _Ending, launcher: Launcher, environ: Mapping[str, str]) -> int:
    """Leave without MPI; a failure ends the whole job, whose other ranks may be waiting in MPI_Init.

    prterun ends a job whose process returns a failure. Hydra does not, but takes PMI-1's abort command, and prints
    nothing about it. Other launchers end each process on its own, so there only the first prints.
    """
    pmi_fd = environ.get("PMI_FD", "") if launcher.name == "mpich" else ""
    ends_job = launcher.name == "openmpi" or pmi_fd.isdecimal()
    if ending.code != 0 and ends_job and not launcher.is_first:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(_START_GRACE_S + _stagger_s(launcher.rank))
    if launcher.is_first or ends_job or ending.code == _BUG:
        _print(ending.lines)
    if ending.code != 0 and launcher.size > 1 and tell_launcher(launcher, environ, ending.code):
        # Hydra ends this process within milliseconds; should it not, the code is the same.
        time.sleep(1.0)
    return ending.code


def _abort(ending: _Ending, mpi: ModuleType) -> NoReturn:
    """Print and end all ranks now; later ranks give lower ones that met the same error the time to do it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank = mpi.COMM_WORLD.rank
    if rank > 0:
        time.sleep(_GRACE_S + _stagger_s(rank))
    _print(ending.lines)
    abort(mpi, ending.code)


def _finalize_together(mpi: ModuleType) -> None:
    """MPI_Finalize once every rank is here, napping while some are not: no rank leaves before rank 0 has printed."""
    request = mpi.COMM_WORLD.Ibarrier()
    while not request.Test():
        time.sleep(0.001)
    mpi.Finalize()


def _stagger_s(rank: int) -> float:
    return min(rank * _GRACE_PER_RANK_S, _LONGEST_STAGGER_S)


def _stdout_is_open() -> bool:
    """Whether stdout can still be written; when not, it becomes /dev/null, so that the last flush is quiet."""
    if sys.stdout is None:
        return False
    try:
        sys.stdout.flush()
        if not _reader_is_gone():
            return True
    except OSError:  # the reader is gone, or the disk is full
        pass
    except ValueError:  # closed by us
        return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return False


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe without a reader; a failed write may leave nothing behind that a flush would notice."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _print(lines: tuple[str, ...]) -> None:
    """Write the lines to stderr in one piece, after what stdout still holds."""
    if not lines:
        return
    _stdout_is_open()
    try:
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
    except OSError:
        return
