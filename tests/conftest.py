"""What all tests share: the ranks of `mpirun -n N pytest --with-mpi` and the running of commands under mpirun."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_moe.engine.start.startup import open_exchange
from dist_moe.parallel.cores import may_spin
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.world import World
from helpers import launching
from helpers.mpi_session import pytest_configure, world
from helpers.nodes import on_two_hosts

__all__ = ["exchange", "mpirun", "pytest_configure", "world"]


@pytest.fixture(autouse=True, scope="session")
def outside_of_the_source_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that tests start must find the installed package, not the source folder, which has no kernels."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True, scope="session")
def signals_are_not_ignored() -> None:
    """A shell starts background jobs with SIGINT ignored, nohup with SIGHUP; programs that tests start inherit it."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(params=["MPI", "shared memory", "two hosts"])
def exchange(world: World, request: pytest.FixtureRequest) -> Exchange:
    """Fresh exchanges over all ranks: by MPI alone, through shared memory, and as if the ranks were on two hosts."""
    if request.param == "two hosts":
        world = on_two_hosts(world)
    return open_exchange(
        world, may_spin(world, 1, os.environ), {"DIST_MOE_SHARED_MEMORY": "0" if request.param == "MPI" else "1"}
    )


@pytest.fixture
def mpirun() -> Callable[..., launching.Finished]:
    """`mpirun(ranks, *command, env=None, timeout_s=60)` of this environment; see `helpers.launching.mpirun`."""
    return launching.mpirun


@pytest.fixture(autouse=True, scope="session")
def untouched_process(signals_are_not_ignored: None) -> Callable[[], None]:
    """Puts back the signal handlers and the log of before the first test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    logger = logging.getLogger("dist_moe")
    log_handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate

    def put_back() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        logger.handlers[:], logger.propagate = log_handlers, propagate
        logger.setLevel(level)

    return put_back


@pytest.fixture(autouse=True)
def process_stays(untouched_process: Callable[[], None]) -> Iterator[None]:
    """A command that a test or its fixture runs in this process takes signals and the log for good."""
    untouched_process()
    yield
    untouched_process()
