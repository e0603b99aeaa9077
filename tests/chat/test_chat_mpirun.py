"""`mpirun -n N dist-moe chat`, as MPICH forwards stdin and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import launching
from helpers.jobs import MARK, marked_processes
from helpers.launching import flavour
from helpers.terminal_chat import GONE_WITHIN_S, SLOW_STEPS

pytestmark = pytest.mark.skipif(flavour() == "openmpi", reason="its mpirun never ends stdin")
WITHIN_S = 60


def wait_for(what: Callable[[], object]) -> None:
    until_s = time.monotonic() + WITHIN_S
    while not what():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def test_control_c_stops_the_answer_and_the_chat_goes_on(tmp_path: Path) -> None:
    out, err, mark = tmp_path / "out", tmp_path / "err", tmp_path.name
    environ = launching.child_environment({"DIST_MOE_TEST_STEP_S": "0.05", "DIST_MOE_CACHE": str(tmp_path), MARK: mark})
    environ["PYTHONPATH"] = os.pathsep.join([SLOW_STEPS, environ["PYTHONPATH"]])
    chat = (sys.executable, "-m", "dist_moe", "chat", "--threads", "1", "--temperature", "0")
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            [launching.mpirun_path(), "-n", "2", *chat],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            env=environ,
            text=True,
            start_new_session=True,
        )
    try:
        assert process.stdin is not None
        process.stdin.write("Tell me a story about a fox.\n")
        process.stdin.flush()
        wait_for(out.read_text)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: "(stopped after " in err.read_text())
        process.stdin.write("/stats\n")
        process.stdin.close()
        assert process.wait(WITHIN_S) == 0, err.read_text()
        until_s = time.monotonic() + GONE_WITHIN_S
        while (left := marked_processes(mark)) and time.monotonic() < until_s:
            time.sleep(0.05)
    finally:
        launching.kill_tree(process)
    assert not left
    assert "interrupted | context" in err.read_text()
