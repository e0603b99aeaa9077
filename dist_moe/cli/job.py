"""A job on all ranks, from the options to the end: open the model, let rank 0 lead and the others follow."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from dist_moe.cli.interrupts import Interrupts
from dist_moe.cli.logs import start_logging
from dist_moe.cli.models import ModelSource, find_model, local_store
from dist_moe.cli.options import ModelOptions
from dist_moe.cli.reading import ReadingProgress
from dist_moe.cli.threads_file import read_threads_file, threads_of_host
from dist_moe.engine.agreement import agree_on_versions
from dist_moe.engine.runtime import EngineOptions, Runtime
from dist_moe.engine.startup import name_bus_errors
from dist_moe.errors import DistMoeError
from dist_moe.kernels import KvFormat
from dist_moe.model_config import ModelConfig
from dist_moe.parallel.cores import CoreShare, describe_cores, share_cores, thread_cores
from dist_moe.parallel.cpu_limits import expected_threads
from dist_moe.parallel.launcher import Launcher, detect_launcher
from dist_moe.parallel.lifeline import start_deadline
from dist_moe.parallel.mpi import abort_channel, end_interrupted
from dist_moe.parallel.plan import make_plan
from dist_moe.parallel.watchdog import Watchdog
from dist_moe.parallel.world import AgreedError, UnfinishedStepError, World
from dist_moe.store.manifest import Manifest
from dist_moe.store.reader import Store
from dist_moe.store.rope_scaling import RopeScaling, scale_config

Options = TypeVar("Options", bound=ModelOptions)
Made = TypeVar("Made")
logger = logging.getLogger(__name__)

# What a host may decide for its own ranks; in all else rank 0's options hold everywhere.
_OWN_OPTIONS = ("threads", "verbose", "log_file")


class Task(Protocol):
    """What rank 0 does with the engine."""

    @property
    def context(self) -> int:
        """Positions that a sequence needs at most."""

    def lead(self, engine: Runtime) -> None:
        """Do it; the other ranks serve meanwhile."""


@runtime_checkable
class StoreChecker(Protocol):
    """A task that was given something that fits certain stores only."""

    def check_store(self, manifest: Manifest, kv: KvFormat) -> None:
        """Refuse a store that it does not fit; called on rank 0 before the weights are read."""


@dataclass(frozen=True)
class Setting:
    """What a task is made from: the directory of the model's text files, its sizes, the launcher, and Ctrl-C."""

    directory: Path
    config: ModelConfig
    launcher: Launcher
    interrupted: Callable[[], bool]


def run_job(
    options: Options,
    make_task: Callable[[Options, Setting], Task],
    find: Callable[[Options], ModelSource] = find_model,
) -> None:
    """Run one task on all ranks.

    Args:
        options: As parsed on this rank.
        make_task: Called on rank 0 before any weight is read: checks the input and makes the task.
        find: Which model the options name.

    Raises:
        AgreedError: A planned error on some rank, raised on all ranks alike.
        EnvironmentMismatch: MPI is missing or does not fit the launcher.
    """
    launcher = detect_launcher(os.environ)
    with start_deadline(launcher, options.start_timeout, os.environ):
        world = World.start(launcher, options.threads or expected_threads(launcher))
        agree_on_versions(world)
        options = _options_of_leader(world, options)
        with world.together("starting the log"):
            start_logging(options.verbose, options.log_file, world.rank, world.hostname)
            name_bus_errors(world, abort_channel(launcher, os.environ))
        watchdog = Watchdog(world, launcher, options.stall_timeout)
    interrupts = Interrupts(leads=world.is_leader, end=lambda: end_interrupted(world.mpi))
    try:
        _run(world, launcher, options, make_task, find, interrupts)
    finally:
        watchdog.leave()


def _run(
    world: World,
    launcher: Launcher,
    options: Options,
    make_task: Callable[[Options, Setting], Task],
    find: Callable[[Options], ModelSource],
    interrupts: Interrupts,
) -> None:
    with world.progress.loading():
        with world.together("reading the model"):
            source = find(options)
            scaling = RopeScaling.parse(options.rope_scaling) if options.rope_scaling else None
            config = scale_config(source.read_config(), scaling)
            require_heads(config, world.size)
        cores = _share_cores(world, launcher, options)
    task = _on_leader(
        world, lambda: make_task(options, Setting(source.text_directory(), config, launcher, interrupts.requested))
    )
    if scaling is not None and world.is_leader:
        logger.warning(
            "--rope-scaling %s: up to %d positions; all prompts, short ones too, give other numbers than without it",
            options.rope_scaling,
            config.max_positions,
        )
    context = int(world.gather_texts(str(task.context if task else ""))[0])
    engine = _start_engine(world, source, options, cores, context, scaling, task)
    if task is None:
        engine.serve()
    with interrupts.orderly():
        _on_leader(world, lambda: _lead(engine, task))


def require_heads(config: ModelConfig, ranks: int) -> None:
    """Refuse more ranks than the model can be cut into, before a long conversion.

    Raises:
        UsageError: There are more ranks than query heads.
    """
    make_plan(
        heads=config.heads,
        heads_per_kv_head=config.heads_per_kv_head,
        vocabulary=config.vocabulary,
        rank=0,
        ranks=ranks,
        layout="whole",
    )


def _share_cores(world: World, launcher: Launcher, options: ModelOptions) -> CoreShare:
    """This rank's cores and threads: as rank 0's --threads-file says for this host, else as asked, else its share."""
    table = _on_leader(world, lambda: read_threads_file(options.threads_file)) or {}
    table = json.loads(world.gather_texts(json.dumps(table))[0])
    return share_cores(world, launcher, options.bind, threads_of_host(table, world.hostname) or options.threads)


def _start_engine(
    world: World,
    source: ModelSource,
    options: ModelOptions,
    cores: CoreShare,
    context: int,
    scaling: RopeScaling | None,
    task: Task | None,
) -> Runtime:
    directory = local_store(world, source, full_check=options.check == "full")
    opening_since_s = time.perf_counter()
    with world.progress.loading(), world.together("opening the store"):
        store = Store.open(directory, rope_scaling=scaling)
    kv = KvFormat.parse(options.kv)
    _on_leader(world, lambda: task.check_store(store.manifest, kv) if isinstance(task, StoreChecker) else None)
    engine_options = EngineOptions(
        context=context,
        threads=cores.threads,
        experts=options.experts,
        kv=kv,
        prefill_chunk=options.prefill_chunk,
        check=options.check,
        scrub=options.scrub,
        copy_weights=options.weights == "copy",
        bind=thread_cores(world, cores.threads),
    )
    here = f"{cores.threads} threads on {describe_cores(cores.mask)}"
    logger.info("model %s, %d ranks, %s, MPI %s", directory, world.size, here, world.library)
    with world.progress.loading():
        on_reading = ReadingProgress(world.size) if world.is_leader and not getattr(options, "quiet", False) else None
        return Runtime(store, world, engine_options, opening_since_s, on_reading)


def _lead(engine: Runtime, task: Task | None) -> None:
    assert task is not None
    try:
        task.lead(engine)
        engine.finish_scrub()
    except AgreedError:
        raise  # the followers have left with it
    except DistMoeError as error:
        if engine.busy:
            raise UnfinishedStepError(error) from error
        engine.stop()
        raise
    engine.stop()


def _on_leader(world: World, action: Callable[[], Made]) -> Made | None:
    """Do something on rank 0 alone; its planned error is every rank's, without a word of rank and host (collective)."""
    made, error = None, None
    if world.is_leader:
        try:
            made = action()
        except AgreedError:
            raise
        except DistMoeError as own:
            error = own
    code, text = json.loads(world.gather_texts(json.dumps([error.exit_code, str(error)] if error else [0, ""]))[0])
    if code and error is None:
        error = DistMoeError(text)
        error.exit_code = code
    world.agree(error, "on rank 0")
    return made


def _options_of_leader(world: World, options: Options) -> Options:
    """Rank 0's options: environments may differ between hosts, the steps may not."""
    leader = json.loads(world.gather_texts(json.dumps(dataclasses.asdict(options)))[0])
    return dataclasses.replace(options, **{name: leader[name] for name in leader if name not in _OWN_OPTIONS})
