"""What Ctrl-C means on rank 0 and on the others."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from dist_moe.cli.interrupts import Interrupts


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
