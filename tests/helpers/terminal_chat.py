"""`dist-moe chat` in a real terminal (a pty) that tests type into, and what is left of it afterwards."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import uuid
from pathlib import Path
from types import TracebackType

import pexpect
import psutil

from helpers import launching
from helpers.jobs import MARK, describe, marked_processes

# A loaded machine may take its time; nothing here waits when things go well.
WITHIN_S = 90
GONE_WITHIN_S = 20
# The editor asks for a message: it switches bracketed paste on.
ASKS = re.escape("\x1b[?2004h")
SLOW_STEPS = str(Path(__file__).with_name("slow_steps"))


def _hear_hang_ups() -> None:
    """Tests that nohup started ignore SIGHUP, and a program in a terminal would inherit that."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class TerminalChat:
    """`with TerminalChat(4, ...) as chat:` types into a chat; nothing of it survives the block."""

    def __init__(self, ranks: int, *arguments: str, home: Path, step_s: float = 0.0, **env: str) -> None:
        """Start it.

        Args:
            ranks: For --ranks.
            arguments: Further ones.
            home: Where its history and packed models go.
            step_s: Seconds that every step takes longer.
            env: Further variables.
        """
        self._mark = uuid.uuid4().hex
        environ = launching.child_environment(
            {
                "TERM": "xterm",
                "PROMPT_TOOLKIT_NO_CPR": "1",  # no terminal is there to say where its cursor is
                "XDG_STATE_HOME": str(home / "state"),
                "DIST_MOE_CACHE": str(home / "cache"),
                "TMPDIR": str(home),
                "DIST_MOE_TEST_STEP_S": str(step_s) if step_s else "",
                MARK: self._mark,
                **env,
            }
        )
        environ["PYTHONPATH"] = os.pathsep.join([SLOW_STEPS, environ["PYTHONPATH"]])
        words = ["-m", "dist_moe", "chat", "--ranks", str(ranks), "--threads", "1", *arguments]
        self.child = pexpect.spawn(
            sys.executable,
            words,
            env=environ,
            timeout=WITHIN_S,
            encoding="utf-8",
            dimensions=(50, 200),
            preexec_fn=_hear_hang_ups,
        )

    def __enter__(self) -> TerminalChat:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.child.close(force=True)
        for process in marked_processes(self._mark):
            process.kill()

    def wait_until_asked(self) -> str:
        """Wait for the editor; returns what was printed before."""
        self.child.expect(ASKS)
        return plain(self.child.before)

    def type(self, text: str) -> None:
        """Type a line."""
        self.child.send(text + "\r")

    def ask(self, text: str) -> str:
        """Type a line and wait until the next can be typed; returns what was printed."""
        self.type(text)
        return self.wait_until_asked()

    def wait_for(self, text: str) -> str:
        """Wait until a text is printed; returns what was printed before."""
        self.child.expect_exact(text)
        return plain(self.child.before)

    def control_c(self) -> None:
        """Press Ctrl-C: the terminal sends SIGINT to all it controls, or the editor reads the key."""
        self.child.sendintr()

    def processes(self) -> list[psutil.Process]:
        """All that live."""
        return marked_processes(self._mark)

    def back_ends(self) -> list[int]:
        """The process ids of the ranks."""
        return sorted(process.pid for process in self.processes() if _is_back_end(process))

    def hit(self, number: signal.Signals) -> None:
        """Send the front end a signal."""
        os.kill(self.child.pid, number)

    def end(self) -> tuple[int | None, list[str]]:
        """Wait for its end; returns the exit code (None if a signal killed it) and what it left."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus, self.left()

    def left(self) -> list[str]:
        """What is left of it, after it had time to go."""
        until_s = time.monotonic() + GONE_WITHIN_S
        while (processes := self.processes()) and time.monotonic() < until_s:
            time.sleep(0.05)
        return [describe(process) for process in processes]


def _is_back_end(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return command[:2] == [sys.executable, "-c"]


def plain(text: str) -> str:
    """A terminal's output without colours, cursor movements and returns."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\x08", "", text)
