"""`dist-moe shard` and `reshard` under mpirun: rank 0 leads and reports, the others write files, too."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dist_moe.cli.interrupts import ending_signals_raise
from dist_moe.errors import DistMoeError, Interrupted, UsageError
from dist_moe.parallel.launcher import detect_launcher

if TYPE_CHECKING:
    from dist_moe.store.convert import Origin
    from dist_moe.store.manifest import Manifest
    from dist_moe.store.team import Team

_START_S = 60.0
_NEVER_STALLED_S = 86400.0  # a rank without a file waits for those that have one

# Opens the source that rank 0 names, told the plan of the store.
OpenOrigin = Callable[[Path, "Manifest"], "Origin"]


def pack_on_ranks(
    lead: Callable[[Team, int], None], open_origin: OpenOrigin, threads: int | None, *, alone: bool = False
) -> None:
    """Make a store with all ranks of the launcher, or with this process where there is none.

    Args:
        lead: What rank 0 does, with the team and the threads that pack on this rank (0: all CPUs).
        open_origin: What the others read.
        threads: Per rank, as the user asked; None: the CPUs of this host divided by its ranks.
        alone: The first rank needs no help.

    Raises:
        AgreedError: A rank met a planned error; with several ranks.
        DistMoeError: With one.
    """
    from dist_moe.store.team import Team

    launcher = detect_launcher(os.environ)
    if alone or launcher.size == 1:
        if launcher.is_first:
            with ending_signals_raise():
                lead(Team(), threads or 0)
        return
    from dist_moe.engine.start.job import Job
    from dist_moe.engine.start.signals import interrupts_ignored
    from dist_moe.parallel.cores import share_cores
    from dist_moe.store.convert import help_write

    job = Job(threads, _START_S, lambda _: _NEVER_STALLED_S)
    world = job.world
    own_threads = share_cores(world, job.launcher, threads=threads).threads
    error: DistMoeError | None = None
    try:
        team = Team(world)
        if world.is_leader:
            error = _error_of(lambda: lead(team, own_threads))
            team.dismiss()
        else:
            with interrupts_ignored():
                help_write(team, open_origin, own_threads)
        world.sleep_until_all()
        job.on_leader(lambda: _raise(error))
    finally:
        job.leave()


def checkpoint_opener(importance: str | None) -> OpenOrigin:
    """How the other ranks open the checkpoint that rank 0 packs, and its calibration, if there is one."""

    def open_origin(path: Path, plan: Manifest) -> Origin:
        from dist_moe.checkpoint.source import open_source
        from dist_moe.store.calibrated import CalibratedImportance
        from dist_moe.store.calibration_file import read_calibration
        from dist_moe.store.convert import checkpoint_origin

        weights = None if importance is None else CalibratedImportance(read_calibration(Path(importance)))
        if (weights.fingerprint if weights else "") != plan.importance:
            raise UsageError(f"--importance {importance}: is another file than on rank 0; give all hosts the same")
        model = open_source(path)
        if model.fingerprint() != plan.source_fingerprint:
            raise UsageError(f"{path}: is another model than on rank 0; give all hosts the same files")
        return checkpoint_origin(model, weights)

    return open_origin


def _error_of(action: Callable[[], None]) -> DistMoeError | None:
    """The planned error that the other ranks do not know of; Ctrl-C ends them at once instead."""
    try:
        action()
    except DistMoeError as error:
        if error.agreed or isinstance(error, Interrupted):
            raise
        return error
    return None


def _raise(error: DistMoeError | None) -> None:
    if error is not None:
        raise error
