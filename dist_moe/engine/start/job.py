"""The ranks of a job from the launcher to the model's store on each host."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dist_moe.engine.start.agreement import agree_on_versions
from dist_moe.engine.start.startup import name_bus_errors
from dist_moe.errors import DistMoeError, UsageError
from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.lifeline import hold_lifeline, start_deadline
from dist_moe.parallel.mpi import abort_channel, running_mpi
from dist_moe.parallel.watchdog import Watchdog
from dist_moe.parallel.world import AgreedError, World
from dist_moe.store import models
from dist_moe.store.convert import Progress
from dist_moe.store.models import ModelSource
from dist_moe.store.plan import StoreOptions

if TYPE_CHECKING:
    from dist_moe.parallel.world import Intracomm

Made = TypeVar("Made")
Fields = TypeVar("Fields", bound=Any)
# Shows how packing goes, unless it is told to be quiet.
ShowPacking = Callable[[bool], AbstractContextManager[Progress]]


class Job:
    """The ranks that run one model.

    Attributes:
        launcher: What started this process.
        world: The ranks.
    """

    def __init__(
        self,
        threads: int | None,
        start_timeout_s: float,
        prepare: Callable[[World], float],
        comm: Intracomm | None = None,
    ) -> None:
        """Start MPI if need be, join the ranks, and begin to watch over them; collective.

        Args:
            threads: Compute threads per rank, to know whether ranks share cores; None: their share.
            start_timeout_s: When MPI has not started on all ranks after so long, the job ends.
            prepare: Called as soon as the ranks can talk; returns rank 0's time limit for stalls in seconds.
            comm: Whose ranks to join; None: all of the launcher's, or this process alone where there is none.

        Raises:
            AgreedError: A rank runs another version, or `prepare` failed there.
            EnvironmentMismatch: MPI is missing or does not fit the launcher.
            UsageError: `comm` is no communicator of this process.
        """
        # Imported late: it counts on MPI's start.
        from dist_moe.parallel.cpu_limits import expected_threads

        self.launcher = detect_launcher(os.environ)
        hold_lifeline(self.launcher, os.environ)
        with start_deadline(self.launcher, start_timeout_s, os.environ):
            self.world = World.start(self.launcher, threads or expected_threads(self.launcher), comm)
            agree_on_versions(self.world)
            stall_timeout_s = prepare(self.world)
            with self.world.together("starting"):
                name_bus_errors(self.world, abort_channel(self.launcher, os.environ))
            self._watchdog = Watchdog(self.world, self.launcher, stall_timeout_s)

    def leave(self) -> None:
        """Tell all ranks that ends are to be expected now."""
        self._watchdog.leave()

    def on_leader(self, action: Callable[[], Made]) -> Made | None:
        """Do something on rank 0 alone; its planned error is every rank's, without a word of rank and host; collective.

        Raises:
            AgreedError: The action raised a planned error.
        """
        made, error = None, None
        if self.world.is_leader:
            try:
                made = action()
            except AgreedError:
                raise
            except DistMoeError as own:
                error = own
        described = json.dumps([error.exit_code, str(error)] if error else [0, ""])
        code, text = json.loads(self.world.gather_texts(described)[0])
        if code and error is None:
            error = DistMoeError(text)
            error.exit_code = code
        self.world.agree(error, "on rank 0")
        return made

    def of_leader(self, text: str) -> str:
        """Rank 0's text, on all ranks; collective."""
        return self.world.gather_texts(text)[0]

    def own_or_leaders(self, text: str) -> str:
        """This rank's text where rank 0 has one too, else rank 0's; collective."""
        leader = self.of_leader(text)
        return text if text and leader else leader


def fields_of_leader(world: World, own: Fields, kept: Collection[str]) -> Fields:
    """Rank 0's values: scripts and environments may differ between hosts, the steps may not; collective.

    Args:
        world: All ranks.
        own: This rank's dataclass, of values that JSON can say.
        kept: What a host may decide for its own ranks.
    """
    leader = json.loads(world.gather_texts(json.dumps(dataclasses.asdict(own)))[0])
    return dataclasses.replace(own, **{name: leader[name] for name in leader if name not in kept})


def finalize_at_exit() -> None:
    """Let the process end MPI in good order when the script is done, as mpi4py does where it has started MPI."""
    atexit.register(_finalize)


def _finalize() -> None:
    mpi = running_mpi()
    if mpi is not None:
        mpi.Finalize()


def _silent(quiet: bool) -> AbstractContextManager[Progress]:
    return nullcontext(lambda done_bytes, total_bytes, what: None)


def local_store(world: World, source: ModelSource, *, full_check: bool, show: ShowPacking | None = None) -> Path:
    """The store of a model on this host; one rank of each node packs it if need be, the others sleep (collective).

    Args:
        world: All ranks.
        source: The model.
        full_check: Whether every byte of a store that was packed before is checked.
        show: Shows how packing goes.

    Raises:
        AgreedError: Some node could not pack it, or some have a store and others a checkpoint.
    """
    kinds = world.gather_texts("a store" if source.format is None else f"a checkpoint to pack as {source.format.label}")
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            where = f"{world.hosts[0]} has {kinds[0]}, {world.hosts[rank]} {kind}"
            raise AgreedError((f"{where}: give every host the model in one form",), UsageError.exit_code)
    if source.format is None:
        return source.path
    directory, error = Path(), None
    if world.local_rank == 0:
        try:
            options = StoreOptions(
                format=source.format, wait=True, replace_damaged=source.in_cache, full_check=full_check
            )
            with (show or _silent)(world.node != 0) as progress:
                directory = models.pack(source, options, progress)
        except DistMoeError as own:
            error = own
    world.sleep_until_all()
    world.agree(error, "packing the model")
    return Path(world.gather_texts(str(directory))[world.node_of_rank.index(world.node)])
