"""The job behind a chat: started in a session of its own, so that Ctrl-C never reaches it, and ended with the chat."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from dist_moe.chat.connection import VARIABLE, Line, LineClosed, Listener
from dist_moe.chat.protocol import ProtocolError, Quit, Ready
from dist_moe.errors import DistMoeError, EnvironmentMismatch
from dist_moe.parallel.hostfile import Hostfile
from dist_moe.parallel.launching import launcher_command, program_command
from dist_moe.parallel.side_channel import local_addresses

# Reads a line from this process, or its end, be it by SIGKILL: then rank 0 has ended the job, or this does.
_GUARD = 'read -r word && exit; sleep 1.2; kill -s KILL -- "-$1" 2>/dev/null; rm -f "$2/rank0"; rmdir "$2" 2>/dev/null'
_LOOK_S = 0.2
_LEAVES_WITHIN_S = 20.0
_KILLED_WITHIN_S = 5.0
_CALLS_WITHIN_S = 30.0
_ERROR = "dist-moe: error"


class JobEnded(DistMoeError):
    """The job has ended by itself; `said` is whether it told the user why."""

    def __init__(self, code: int, *, said: bool) -> None:
        """Name its exit code, or the signal that killed it."""
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        super().__init__(f"the job {how}, so the chat is over")
        self.said = said
        self.exit_code = 128 - code if code < 0 else code or 1


class Job:
    """`with Job(...) as job:` starts the ranks; whatever happens, none of them survives the block."""

    def __init__(self, arguments: Sequence[str], ranks: int | None, hosts: Hostfile | None) -> None:
        """Start `dist-moe` with the same arguments on its ranks.

        Args:
            arguments: Of the command line, without the program.
            ranks: How many; None or 1 starts a plain process, unless there are hosts.
            hosts: Where; None is this host.

        Raises:
            EnvironmentMismatch: There is no mpirun that fits the MPI library.
            UsageError: The host file is of the other MPI's dialect.
        """
        self._directory = Path(tempfile.mkdtemp(prefix="dist-moe-"))  # mkdtemp makes it private
        try:
            addresses = [] if hosts is None else _addresses()
            self._listener = Listener(self._directory, addresses)
            environ = {**os.environ, VARIABLE: self._listener.address.to_environment()}
            program = program_command(arguments)
            launcher = [] if ranks in (None, 1) and hosts is None else launcher_command(ranks, hosts, environ, "chat")
            self._process = subprocess.Popen(
                [*launcher, *program],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,
            )
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "dist-moe-chat-guard", str(self._process.pid), str(self._directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._said = self._mute = False
        self._line: Line | None = None
        self._teller = threading.Thread(target=self._pass_on, name="job's stderr", daemon=True)
        self._teller.start()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the job: orderly, then not."""
        with contextlib.suppress(LineClosed):
            if self._line is not None:
                self._line.send(Quit())
        if self._line is None or error is not None:
            self._mute = True  # what a launcher says about ranks that are killed on purpose
            self._kill(signal.SIGTERM)
        if not self._wait(_LEAVES_WITHIN_S if error is None else _KILLED_WITHIN_S):
            self._kill(signal.SIGKILL)
            self._wait(_KILLED_WITHIN_S)
        if self._line is not None:
            self._line.close()
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._guard.communicate(b"spared\n", _KILLED_WITHIN_S)
        self._teller.join(1.0)
        self._listener.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def connect(self, start_timeout_s: float) -> tuple[Line, Ready]:
        """Wait until rank 0 calls and its model is loaded.

        Raises:
            JobEnded: It has ended instead.
            EnvironmentMismatch: Rank 0 did not call in time.
        """
        deadline_s = time.monotonic() + start_timeout_s + _CALLS_WITHIN_S
        while self._line is None:
            if self._process.poll() is not None:
                raise self.ended()
            if time.monotonic() > deadline_s:
                raise EnvironmentMismatch(
                    f"rank 0 has not called within {start_timeout_s + _CALLS_WITHIN_S:g} s: mpirun is stuck, or a "
                    "firewall is between its host and this one; where starting takes long, raise --start-timeout"
                )
            self._line = self._listener.accept(_LOOK_S)
        try:
            ready = self._line.receive()
        except LineClosed:
            raise self.ended() from None
        if not isinstance(ready, Ready):
            raise ProtocolError(f"chat protocol: expected ready, found {ready.name}")
        self._said = False
        return self._line, ready

    def ended(self) -> JobEnded:
        """How it ended, now that its line is closed."""
        if not self._wait(_KILLED_WITHIN_S):
            self._kill(signal.SIGKILL)
            self._wait(_KILLED_WITHIN_S)
        self._teller.join(1.0)
        return JobEnded(self._process.returncode if self._process.returncode is not None else 1, said=self._said)

    def _wait(self, timeout_s: float) -> bool:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _kill(self, number: signal.Signals) -> None:
        """Signal mpirun and what is in its session; the ranks die with it (`parallel.lifeline`)."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, number)

    def _pass_on(self) -> None:
        """Print what the job prints, line by line, also while the user is asked."""
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            text = raw.decode(errors="replace")
            self._said |= text.startswith(_ERROR)
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write("" if self._mute else text)
                sys.stderr.flush()


def _addresses() -> list[str]:
    """Where other hosts may find this one; rank 0 tries the loopback address last: there it may meet a stranger."""
    first, *others = local_addresses()
    return [*others, first]
