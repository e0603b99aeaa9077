"""Other hosts over ssh and rsync: the only door to both programs."""

from __future__ import annotations

import re
import shlex
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_moe.errors import EnvironmentMismatch, UsageError

# No question at a prompt: several hosts are asked at once, and nobody can see which one asks.
# A host that says nothing for a minute is lost: checksums of a store take longer, in silence.
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=20"
NO_PROGRAM = 127
_HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.-]*")
# rsync is silent while the other side reads what it has of a file.
_SILENCE_S = 600
_KEPT_CHARACTERS = 400


def require_host_name(host: str) -> None:
    """Refuse what ssh would take for an option or a command.

    Raises:
        UsageError: It is not a plain name or address, with or without user@.
    """
    if not _HOST.fullmatch(host):
        raise UsageError(f"{host!r} is not the name of a host: expected letters, digits, dots, - and _, or user@host")


@dataclass(frozen=True)
class Outcome:
    """How a command ended; `errors` is what it said last on stderr, on one line."""

    code: int
    output: str
    errors: str


class Commands:
    """Runs ssh and rsync in several threads, and ends them all when the user wants no more.

    Attributes:
        stopped: Whether `stop` was called.
    """

    def __init__(self, ssh: str = SSH) -> None:
        """Reach hosts by this command; nothing is started yet.

        Raises:
            UsageError: It cannot be split into words.
        """
        try:
            self._ssh = shlex.split(ssh)
        except ValueError as error:
            raise UsageError(f"--ssh: {ssh!r} is not a command ({error}): close the quotes") from error
        if not self._ssh:
            raise UsageError("--ssh: expected a command such as 'ssh -p 2222', found nothing")
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def script(self, host: str, text: str, *arguments: str) -> Outcome:
        """Let a host's shell run a script with arguments, none of which another shell reads."""
        remote = " ".join(["sh", "-s", "--", *(shlex.quote(argument) for argument in arguments)])
        return self._run([*self._ssh, host, remote], text)

    def send(
        self,
        source: Path,
        host: str,
        directory: str,
        names: Sequence[str],
        options: Sequence[str] = (),
        seen: Callable[[str], object] | None = None,
    ) -> Outcome:
        """Bring files of a directory into one of a host; what an earlier try has brought is not sent again.

        Args:
            source: The directory.
            host: Where to.
            directory: The absolute path there; it exists.
            names: Of files in `source`.
            options: More of rsync's.
            seen: Called with each line that rsync prints.
        """
        return self._run(self.send_command(source, host, directory, options), "\n".join(names) + "\n", seen)

    def send_command(self, source: Path, host: str, directory: str, options: Sequence[str] = ()) -> list[str]:
        """The command of `send`, which reads the names of the files from stdin."""
        # A file appears under its name when it is whole; a part of one waits in .partial for the next try.
        fixed = ["--files-from=-", "--times", "--partial-dir=.partial", "--protect-args", f"--timeout={_SILENCE_S}"]
        return ["rsync", *fixed, *options, "-e", shlex.join(self._ssh), f"{source}/", f"{host}:{directory}/"]

    def stop(self) -> None:
        """End what runs; from any thread. What is started afterwards ends at once."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.terminate()

    def _run(self, command: Sequence[str], text: str, seen: Callable[[str], object] | None = None) -> Outcome:
        try:
            with self._lock:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                )
                self._running.add(process)
                if self.stopped:
                    process.terminate()
        except FileNotFoundError as error:
            raise EnvironmentMismatch(f"{command[0]} is not installed on this machine: install it") from error
        errors: list[str] = []
        assert process.stdout is not None
        assert process.stderr is not None
        stderr = process.stderr
        listener = threading.Thread(target=lambda: errors.extend(stderr), daemon=True)
        listener.start()
        try:
            _write(process, text)
            output = []
            for line in process.stdout:  # universal newlines: rsync's progress ends with carriage returns
                output.append(line.rstrip("\n"))
                if seen is not None:
                    seen(output[-1])
            process.wait()
            listener.join()
        finally:
            with self._lock:
                self._running.discard(process)
        said = " ".join(line.strip() for line in errors if line.strip())
        return Outcome(process.returncode, "\n".join(output), said[-_KEPT_CHARACTERS:])


def _write(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(text)
        process.stdin.close()
    except BrokenPipeError:
        return  # it has ended, and its code says why
