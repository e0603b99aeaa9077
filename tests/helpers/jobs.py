"""A job under mpirun that tests interrupt, stop and kill, and what is left of it afterwards."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
import pytest

from helpers import launching

FAULTY = str(Path(__file__).with_name("faulty.py"))
# A tiny story on the bundled model. Waiting ranks sleep, so that many ranks on few cores are quick.
STORY = ("run", "-p", "Once upon a time", "--temperature", "0", "--ignore-eos", "--threads", "1")
HANGS = "a rank hangs\n"  # said by `faulty.py`
MARK = "DIST_MOE_TEST_JOB"
_RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
_PROXIES = ("hydra_pmi_proxy", "prted")
_GONE_WITHIN_S = 5.0


@dataclass(frozen=True)
class Ended:
    """How a job ended: exit code, output, seconds since it was started or hit, and what it left behind."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    left: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """The lines that are ours: launchers add their own."""
        return [line for line in self.stderr.splitlines() if line.startswith("dist-moe: ")]

    def __str__(self) -> str:
        """Everything, for messages."""
        return (
            f"exit code {self.code} after {self.seconds:.1f} s, left {self.left}\n"
            f"--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"
        )


class Job:
    """`with Job(4, ...) as job:` runs a command on ranks; whatever happens, nothing of it survives the block."""

    def __init__(
        self, ranks: int, *command: str, env: Mapping[str, str] | None = None, launch: Sequence[str] = ()
    ) -> None:
        """Start it: `launch`, by default `mpirun -n ranks`, and the command."""
        self._mark = uuid.uuid4().hex
        self._shared_before = _shared_memory()
        self._stdout = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._since_s = time.monotonic()
        self.process = subprocess.Popen(
            [*(launch or (launching.mpirun_path(), "-n", str(ranks))), *command],
            stdin=subprocess.DEVNULL,
            stdout=self._stdout,
            stderr=self._stderr,
            env=launching.child_environment({**(env or {}), MARK: self._mark}),
            start_new_session=True,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        launching.kill_tree(self.process)
        for process in self._processes():
            process.kill()
        self._stdout.close()
        self._stderr.close()

    def stdout(self) -> str:
        """What it printed so far."""
        return _text(self._stdout)

    def stderr(self) -> str:
        """What it said so far."""
        return _text(self._stderr)

    def wait_for(self, what: Callable[[], object], timeout_s: float = 60) -> None:
        """Wait until something is true; fail if it does not come or the job ends before."""
        until_s = time.monotonic() + timeout_s
        while not what():
            if time.monotonic() > until_s or self.process.poll() is not None:
                pytest.fail(f"the job did not get there: {self.stdout()}\n{_text(self._stderr)}")
            time.sleep(0.01)

    def wait_for_text(self, characters: int = 30) -> None:
        """Wait until rank 0 is generating."""
        self.wait_for(lambda: len(self.stdout()) >= characters)

    def ranks(self) -> dict[int, int]:
        """Process id by rank, of the ranks that run."""
        found = {}
        for process in self._processes():
            environ = _environ(process)
            rank = next((environ[name] for name in _RANK_VARIABLES if name in environ), None)
            if rank is not None and process.name() != "sh":
                found[int(rank)] = process.pid
        return found

    def proxy(self) -> int | None:
        """The launcher's helper process, if it has one on a single host (Hydra's has)."""
        return next((process.pid for process in self._processes() if process.name() in _PROXIES), None)

    def hit(self, pid: int, number: signal.Signals) -> None:
        """Send a signal; the time until the end counts from here."""
        self._since_s = time.monotonic()
        os.kill(pid, number)

    def end(self, timeout_s: float = 60) -> Ended:
        """Wait for the end and see what is left; a job that does not end fails the test."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job did not end within {timeout_s} s: {self.stdout()}\n{_text(self._stderr)}")
        seconds = time.monotonic() - self._since_s
        until_s = time.monotonic() + _GONE_WITHIN_S
        while (left := self._left()) and time.monotonic() < until_s:
            time.sleep(0.05)
        return Ended(self.process.returncode, self.stdout(), _text(self._stderr), seconds, left)

    def _left(self) -> tuple[str, ...]:
        processes = [describe(process) for process in self._processes()]
        return (*processes, *sorted(_shared_memory() - self._shared_before))

    def _processes(self) -> list[psutil.Process]:
        """All processes of the job that live, launchers too; its ranks inherit the mark."""
        return marked_processes(self._mark)


def marked_processes(mark: str) -> list[psutil.Process]:
    """All living processes with this mark in their environment."""
    return [process for process in psutil.process_iter() if _environ(process).get(MARK) == mark]


def slow(*arguments: str) -> tuple[str, ...]:
    """The command line of a job that takes 20 s or so: nobody has to hurry to hit it."""
    return faulty("slow", "decode", 0, "-n", "400", *arguments)


def faulty(act: str, phase: str, rank: int, *arguments: str) -> tuple[str, ...]:
    """The command line of a job whose rank fails; see `faulty.py`."""
    return (sys.executable, FAULTY, act, phase, str(rank), "--", *STORY, *arguments)


def packed_demo(cache: Path) -> dict[str, str]:
    """The environment of jobs that find the demo model packed in a new cache directory."""
    env = {"DIST_MOE_CACHE": str(cache), "DIST_MOE_YIELD": "1"}
    assert launching.run(*faulty("none", "decode", 0, "-n", "2"), env=env).code == 0
    return env


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return {} if process.status() == psutil.STATUS_ZOMBIE else process.environ()
    except (psutil.Error, OSError):
        return {}


def describe(process: psutil.Process) -> str:
    """A process in words, for messages."""
    try:
        return f"process {process.pid} ({process.status()}): {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return f"process {process.pid}"


def _shared_memory() -> set[str]:
    """Memory of jobs; other programs of ours (csrc/tests) use other names there."""
    return {str(path) for path in Path("/dev/shm").iterdir() if re.fullmatch(r"dist-moe-[0-9a-f]{16}", path.name)}


def _text(file: object) -> str:
    with open(os.dup(file.fileno()), encoding="utf-8", errors="replace") as copy:  # type: ignore[attr-defined]  # noqa: PTH123
        return os.pread(copy.fileno(), 1 << 24, 0).decode(errors="replace")
