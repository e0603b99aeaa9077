"""What Ctrl-C means on rank 0 and on the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_moe.cli.interrupts import FINISH, Interrupts
from dist_moe.errors import Interrupted, Terminated
from dist_moe.parallel.progress import Progress
from helpers import launching


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *FINISH)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_one_asks_and_the_second_one_ends() -> None:
    interrupts = Interrupts(leads=True)
    with interrupts.orderly():
        assert not interrupts.requested()
        interrupt()
        assert interrupts.requested()
        with pytest.raises(KeyboardInterrupt):
            interrupt()


def test_outside_the_orderly_part_it_ends_at_once() -> None:
    interrupts = Interrupts(leads=True)
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    with interrupts.orderly():
        pass
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_the_other_ranks_ignore_it() -> None:
    interrupts = Interrupts(leads=False)
    interrupt()
    assert not interrupts.requested()


def test_a_process_started_to_ignore_it_goes_on_doing_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupts = Interrupts(leads=True)
    with interrupts.orderly():
        interrupt()
    assert not interrupts.requested()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_schedulers_signal_asks_however_often_it_comes(number: signal.Signals, code: int) -> None:
    interrupts = Interrupts(leads=True)
    with interrupts.orderly():
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert interrupts.requested()
        assert interrupts.final
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    error = Interrupted("interrupted after 3 tokens")
    interrupts.explain(error)
    assert str(error) == f"interrupted after 3 tokens (by {number.name})"
    assert error.exit_code == code


def test_a_schedulers_signal_at_the_start_ends_at_once() -> None:
    Interrupts(leads=True)
    with pytest.raises(Terminated) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 143


def test_control_c_keeps_its_sentence_and_code() -> None:
    interrupts, error = Interrupts(leads=True), Interrupted("interrupted after 3 tokens")
    with interrupts.orderly():
        interrupt()
    interrupts.explain(error)
    assert (str(error), error.exit_code, interrupts.final) == ("interrupted after 3 tokens", 130, False)


def test_the_other_ranks_pass_a_schedulers_signal_on() -> None:
    progress = Progress()
    interrupts = Interrupts(leads=False, progress=progress)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert progress.asked == signal.SIGUSR1
    assert not interrupts.requested()


def test_a_task_that_does_not_look_keeps_the_default() -> None:
    before = signal.getsignal(signal.SIGTERM)
    Interrupts(leads=True, finish=False)
    assert signal.getsignal(signal.SIGTERM) is before


# A mutex that its owner locks again: C code that no signal gets the main thread out of.
STUCK = """
import ctypes, os, sys
from dist_moe.cli.interrupts import Interrupts
mutex = ctypes.create_string_buffer(64)
interrupts = Interrupts(leads=True, end=lambda code: os._exit(code - 53))
def stick():
    for _ in range(2):
        print("locks", flush=True)
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
if sys.argv[1] == "in a step":
    with interrupts.orderly():
        stick()
stick()
"""


def wait_until_asleep(pid: int) -> None:
    """Until the main thread has slept for a while: it is inside the second lock, not before it."""
    asleep = 0
    while asleep < 20:
        state = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rsplit(") ")[1][0]
        asleep = asleep + 1 if state == "S" else 0
        time.sleep(0.02)


@pytest.mark.parametrize(("where", "needed"), [("in a step", 2), ("at the start", 1)])
def test_a_main_thread_that_is_stuck_in_c_is_ended_from_another(where: str, needed: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=launching.child_environment(),
    )
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["locks\n"] * 2
        wait_until_asleep(process.pid)
        for _ in range(needed - 1):
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 77
    finally:
        process.kill()
        process.communicate()
