"""A command's job on all ranks, from the options to the end: rank 0 leads an engine, the others follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from dist_moe.cli.interrupts import Interrupts
from dist_moe.cli.logs import start_logging
from dist_moe.cli.models import find_model
from dist_moe.cli.options import ModelOptions
from dist_moe.cli.reading import ReadingProgress
from dist_moe.cli.shard_progress import ShardProgress
from dist_moe.cli.threads_file import read_threads_file
from dist_moe.engine.engine import Engine
from dist_moe.engine.opening import Shows
from dist_moe.engine.requests.questions import TextSide
from dist_moe.engine.runtime import Runtime
from dist_moe.engine.start.job import Job, fields_of_leader
from dist_moe.engine.start.settings import Settings
from dist_moe.errors import DistMoeError, Interrupted
from dist_moe.kernels import KvFormat
from dist_moe.model_config import ModelConfig
from dist_moe.parallel.launcher import Launcher
from dist_moe.parallel.mpi import end_interrupted
from dist_moe.parallel.world import AgreedError, UnfinishedStepError, World
from dist_moe.store.manifest import Manifest
from dist_moe.store.models import ModelSource

Options = TypeVar("Options", bound=ModelOptions)

# What a host may decide for its own ranks; in all else rank 0's options hold everywhere.
_OWN_OPTIONS = ("threads", "verbose", "log_file")


class Task(Protocol):
    """What rank 0 does with a runtime."""

    @property
    def context(self) -> int:
        """Positions that a sequence needs at most."""

    def lead(self, engine: Runtime) -> None:
        """Do it; the other ranks serve meanwhile."""


@runtime_checkable
class EngineTask(Protocol):
    """What rank 0 does with an engine."""

    @property
    def context(self) -> int:
        """Positions that a sequence needs at most."""

    def lead_engine(self, engine: Engine) -> None:
        """Do it; the other ranks serve meanwhile."""


@runtime_checkable
class StoreChecker(Protocol):
    """A task that was given something that fits certain stores only."""

    def accept(self, manifest: Manifest, kv: KvFormat) -> None:
        """Refuse a store that it does not fit; called on rank 0 before the weights are read."""


@dataclass(frozen=True)
class Setting:
    """What a task is made from: the model's text files and sizes, the launcher, and who asks for its end."""

    directory: Path
    config: ModelConfig
    launcher: Launcher
    interrupts: Interrupts
    text: TextSide

    @property
    def interrupted(self) -> Callable[[], bool]:
        """Whether Ctrl-C or a scheduler asks for the end; looked at after each step."""
        return self.interrupts.requested


def run_job(
    options: Options,
    make_task: Callable[[Options, Setting], Task | EngineTask],
    find: Callable[[Options], ModelSource] = find_model,
    *,
    finish: bool = True,
) -> None:
    """Run one task on all ranks.

    Args:
        options: As parsed on this rank.
        make_task: Called on rank 0 before any weight is read: checks the input and makes the task.
        find: Which model the options name.
        finish: Whether SIGTERM and SIGUSR1 end the task after its step, because it looks; else they kill the ranks.

    Raises:
        AgreedError: A planned error on some rank, raised on all ranks alike.
        EnvironmentMismatch: MPI is missing or does not fit the launcher.
    """

    def prepare(world: World) -> float:
        nonlocal options
        own_model = options.model
        options = fields_of_leader(world, options, _OWN_OPTIONS)
        if own_model is not None and options.model is not None:  # a host may have its store at another place
            options = dataclasses.replace(options, model=own_model)
        with world.together("starting the log"):
            start_logging(options.verbose, options.log_file, world.rank, world.hostname)
        return options.stall_timeout

    job = Job(options.threads, options.start_timeout, prepare)
    interrupts = Interrupts(
        leads=job.world.is_leader,
        end=lambda code: end_interrupted(job.world.mpi, code),
        progress=job.world.progress,
        finish=finish,
    )
    try:
        table = job.on_leader(lambda: read_threads_file(options.threads_file)) or {}
        engine = Engine.join(job, settings_of(options, table), lambda: find(options), _shows(options))
        _run(job, engine, lambda: make_task(options, _setting(job, engine, interrupts)), interrupts)
    finally:
        job.leave()


def settings_of(options: ModelOptions, threads_by_host: dict[str, int]) -> Settings:
    """An engine's settings from a command's options."""
    return Settings(
        threads=options.threads,
        kv=options.kv,
        experts=options.experts,
        exchange=options.exchange,
        wire=options.wire,
        prefill_chunk=options.prefill_chunk,
        weights=options.weights,
        check=options.check,
        scrub=options.scrub,
        bind=options.bind,
        quant=options.quant,
        stall_timeout_s=options.stall_timeout,
        start_timeout_s=options.start_timeout,
        threads_by_host=threads_by_host,
        rope_scaling=options.rope_scaling,
    )


def _run(job: Job, engine: Engine, make_task: Callable[[], Task | EngineTask], interrupts: Interrupts) -> None:
    task = job.on_leader(make_task)
    accept = task.accept if isinstance(task, StoreChecker) else None
    engine.load(int(job.of_leader(str(task.context if task else "1"))), accept)
    with interrupts.orderly():
        try:
            engine.lead(lambda _: _lead(engine, task, interrupts))
        except AgreedError:
            raise  # the other ranks have left with it
        except DistMoeError as error:
            if not error.agreed:
                raise UnfinishedStepError(error) from error
            engine.close(finish=False)
            raise
        engine.close()


def _lead(engine: Engine, task: Task | EngineTask | None, interrupts: Interrupts) -> None:
    assert task is not None
    try:
        if isinstance(task, EngineTask):
            task.lead_engine(engine)
        else:
            task.lead(engine.runtime)
    except Interrupted as error:
        interrupts.explain(error)
        raise


def _setting(job: Job, engine: Engine, interrupts: Interrupts) -> Setting:
    return Setting(engine.text.directory, engine.config, job.launcher, interrupts, engine.text)


def _shows(options: ModelOptions) -> Shows:
    return Shows(ShardProgress, None if getattr(options, "quiet", False) else ReadingProgress)
