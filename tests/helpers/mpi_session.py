"""`mpirun -n N pytest --with-mpi`: rank 0 alone reports, and no rank waits for one that failed.

Only tests marked `mpi` run under --with-mpi; plain `pytest` runs all others. The ranks agree after each test: one that
fails on any rank ends the run on all of them, and its failure is printed once, by rank 0 if all ranks finished the
test, else by the rank that failed.
"""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from _pytest.runner import runtestprotocol

from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.world import World

# A rank that failed gives the others this long to finish the test; later ranks longer than it takes to end the job,
# so that one of them prints.
_FAILED_GRACE_S = 5.0
_GRACE_PER_RANK_S = 1.0
# A rank that passed waits this long for the others, which may be stuck in a collective that it left out.
_PASSED_WAIT_S = float(os.environ.get("DIST_MOE_TEST_WAIT_S", "120"))
_WORLD = pytest.StashKey[World]()


def pytest_configure(config: pytest.Config) -> None:
    """Under --with-mpi, start MPI and let the ranks run as one session."""
    if not config.getoption("--with-mpi", default=False) or config.pluginmanager.has_plugin("mpi-session"):
        return
    launcher = detect_launcher(os.environ)
    config.stash[_WORLD] = World.start(launcher)
    # A world of its own, so that the agreement never meets a collective that a test left unfinished.
    config.pluginmanager.register(MpiSession(config, World.start(launcher)), "mpi-session")


@pytest.fixture(scope="session")
def world(request: pytest.FixtureRequest) -> World:
    """All ranks under --with-mpi, else one rank without MPI."""
    return request.config.stash.get(_WORLD, None) or World()


class MpiSession:
    """The hooks of one rank's pytest."""

    def __init__(self, config: pytest.Config, world: World) -> None:
        self.config = config
        self.world = world
        self.collect_failures: list[str] = []
        # A rank stuck inside an MPI call runs no signal handler: only pytest-timeout's thread can end it.
        config.option.timeout_method = "thread"
        if world.rank > 0:
            config.option.xmlpath = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if self.world.rank > 0:
            session.config.get_terminal_writer()._file = Path(os.devnull).open("w")  # noqa: SIM115

    def pytest_report_header(self) -> str:
        return f"ranks: {self.world.size} ({self.world.library}); tests without the mark 'mpi' are left to plain pytest"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        others = [item for item in items if item.get_closest_marker("mpi") is None]
        if others:
            config.hook.pytest_deselected(items=others)
            items[:] = [item for item in items if item.get_closest_marker("mpi") is not None]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.collect_failures.append(f"{report.nodeid}: {report.longreprtext}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Before the first test: the ranks must have collected the same ones."""
        failures = self._settle("\n".join(self.collect_failures))
        own = bool(self.collect_failures)
        if failures and not own:
            self.config.get_terminal_writer().line(failures)
            session.testsfailed += 1
        ids = zlib.crc32("\n".join(item.nodeid for item in session.items).encode())
        if not failures and not self._same_everywhere(ids):
            raise session.Interrupted("the ranks collected different tests")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        own = [report for report in reports if report.failed]
        failure = self._settle("\n".join(_text(report) for report in own))
        if failure:
            item.session.shouldfail = "a test failed, which ends the run on all ranks"
        if failure and not own:
            report = next((report for report in reports if report.when == "call"), reports[0])
            report.outcome, report.longrepr = "failed", failure
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        if not isinstance(excinfo.value, pytest.Session.Interrupted):
            self._abort(f"interrupted: {excinfo.value!r}", 130)

    def pytest_internalerror(self, excrepr: object) -> None:
        self._abort(f"pytest's internal error: {excrepr}", 3)

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        self.world.finalize()

    def _settle(self, failure: str) -> str:
        """Tell all ranks whether any failed (collective).

        Returns the text of the lowest rank that did, with its number; "" when none did. A rank that waits too long for
        the others prints why and ends the job.
        """
        world = self.world
        if world.comm is None or world.mpi is None:
            return failure
        lowest = np.array([world.rank if failure else world.size], np.int64)
        first = np.empty(1, np.int64)
        request = world.comm.Iallreduce([lowest, world.mpi.INT64_T], [first, world.mpi.INT64_T], world.mpi.MIN)
        limit_s = _FAILED_GRACE_S + _GRACE_PER_RANK_S * world.rank if failure else _PASSED_WAIT_S
        deadline_s = time.monotonic() + limit_s
        while not request.Test():
            if time.monotonic() > deadline_s:
                self._abort(failure or f"passed, and waited {limit_s:.0f} s for ranks that did not finish the test", 1)
            time.sleep(0.002)
        if first[0] == world.size:
            return ""
        texts = world.gather_texts(failure)
        failed = [rank for rank, text in enumerate(texts) if text]
        others = f" (also failed: ranks {', '.join(map(str, failed[1:]))})" if failed[1:] else ""
        return f"on rank {failed[0]} of {world.size}{others}:\n{texts[failed[0]]}"

    def _same_everywhere(self, number: int) -> bool:
        return set(self.world.gather_texts(str(number))) == {str(number)}

    def _abort(self, text: str, code: int) -> NoReturn:
        """Print to the real stderr and end all ranks."""
        capture = self.config.pluginmanager.get_plugin("capturemanager")
        if capture is not None:
            capture.suspend_global_capture(in_=True)
        os.write(2, f"\n=== rank {self.world.rank} of {self.world.size}: {text}\n".encode())
        self.world.abort(code)


def _text(report: pytest.TestReport) -> str:
    """A failed report as text: where, traceback and captured output."""
    sections = [f"--- {title} ---\n{content}" for title, content in report.sections]
    return "\n".join([f"{report.nodeid} ({report.when})", report.longreprtext, *sections])
