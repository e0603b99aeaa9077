"""A process whose launcher is dead before it could ask to die with it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest

from helpers import launching

PROGRAM = """
import os
from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.lifeline import hold_lifeline
hold_lifeline(detect_launcher(os.environ), os.environ)
print("lives")
"""
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2"}
PRTERUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}


def run(env: dict[str, str], *fds: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=launching.child_environment(env),
        pass_fds=fds,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def prterun_at(port: int) -> dict[str, str]:
    return {**PRTERUN, "PMIX_SERVER_URI41": f"prterun-vm-1@0.0;tcp4://127.0.0.1:{port}"}


@pytest.mark.parametrize("dead", [False, True])
def test_hydra(dead: bool) -> None:
    ours, hydras = socket.socketpair()
    with ours, hydras:
        if dead:
            hydras.close()
        done = run({**HYDRA, "PMI_FD": str(ours.fileno())}, ours.fileno())
    assert (done.returncode, done.stdout) == ((-signal.SIGKILL, "") if dead else (0, "lives\n")), done


@pytest.mark.parametrize("dead", [False, True])
def test_prterun(dead: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if dead:
            server.close()
        done = run(prterun_at(port))
    assert (done.returncode, done.stdout) == ((-signal.SIGKILL, "") if dead else (0, "lives\n")), done


def test_a_launcher_that_cannot_be_asked_is_taken_to_live() -> None:
    for env in (HYDRA, PRTERUN, {**PRTERUN, "PMIX_SERVER_URI41": "elsewhere"}):
        assert run(env).returncode == 0
