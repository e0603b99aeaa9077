"""From a model's name to a runtime: what is agreed on before any weight is read, and the start itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dist_moe.engine.requests.questions import TextSide
from dist_moe.engine.runtime import Runtime
from dist_moe.engine.start.job import Job, ShowPacking, fields_of_leader, local_store
from dist_moe.engine.start.options import EngineOptions
from dist_moe.engine.start.read_ahead import ReadProgress
from dist_moe.engine.start.settings import Settings
from dist_moe.errors import UsageError
from dist_moe.kernels import KvFormat
from dist_moe.model_config import ModelConfig
from dist_moe.parallel.cores import CoreShare, describe_cores, share_cores, thread_cores
from dist_moe.store.manifest import Manifest
from dist_moe.store.models import ModelSource
from dist_moe.store.reader import Store
from dist_moe.store.rope_scaling import RopeScaling, scale_config

Acceptor = Callable[[Manifest, KvFormat], None]
logger = logging.getLogger(__name__)
# What a host may decide for its own ranks; in all else rank 0's settings hold everywhere.
_OWN_SETTINGS = ("threads", "isa")


@dataclass(frozen=True)
class Shows:
    """Who is told how a start goes: while a model is packed, and while weights are read."""

    packing: ShowPacking | None = None
    reading: Callable[[int], ReadProgress] | None = None  # from the number of ranks to what rank 0 tells


class Opening:
    """A model that is known but not loaded.

    Attributes:
        config: Its sizes.
        settings: Rank 0's, with this rank's threads and ISA level.
        text: Its tokenizer and templates.
    """

    def __init__(self, job: Job, settings: Settings, find: Callable[[], ModelSource], shows: Shows) -> None:
        """Find the model, check that it can be run, and take this rank's cores; collective.

        Args:
            job: The ranks.
            settings: How to run.
            find: Which model.
            shows: Who is told how the start goes.

        Raises:
            AgreedError: There is no such model, or the settings or the ranks do not fit it.
        """
        self._job, self._shows = job, shows
        world = job.world
        with world.progress.loading():
            with world.together("checking the options"):
                settings.require_valid()
            self.settings = fields_of_leader(world, settings, _OWN_SETTINGS)
            with world.together("reading the model"):
                self._source = find()
                self._scaling = RopeScaling.parse(self.settings.rope_scaling) if self.settings.rope_scaling else None
                self.config: ModelConfig = scale_config(
                    self._source.read_config(with_text=world.is_leader), self._scaling
                )
            self._cores = self._share_cores()
        if self._scaling is not None and world.is_leader:
            words = (
                "--rope-scaling %s: up to %d positions; all prompts, short ones too, give other numbers than without"
            )
            logger.warning(words, self.settings.rope_scaling, self.config.max_positions)
        directory = job.on_leader(self._source.text_directory)
        self.text: TextSide | None = None
        with world.together("reading the model's text files"):
            if directory is not None:
                self.text = TextSide(directory, self.config)

    def open(self, context: int, accept: Acceptor | None = None) -> Runtime:
        """Load the weights; collective.

        Args:
            context: Positions of a sequence at most.
            accept: On rank 0: told the store before its weights are read, to refuse it.

        Raises:
            AgreedError: Some rank cannot take part.
        """
        world, settings = self._job.world, self.settings
        full_check = settings.check == "full"
        directory = local_store(world, self._source, full_check=full_check, show=self._shows.packing)
        opening_since_s = time.perf_counter()
        with world.progress.loading(), world.together("opening the store"):
            store = Store.open(directory, rope_scaling=self._scaling, with_text=world.is_leader)
        kv = KvFormat.parse(settings.kv)
        self._job.on_leader(lambda: accept(store.manifest, kv) if accept is not None else None)
        options = EngineOptions(
            context=context,
            threads=self._cores.threads,
            experts=settings.experts,
            exchange=settings.exchange,
            wire=settings.wire,
            kv=kv,
            resident=settings.resident,
            prefill_chunk=settings.prefill_chunk,
            isa=settings.isa,
            check=settings.check,
            scrub=settings.scrub,
            copy_weights=settings.weights == "copy",
            bind=thread_cores(world, self._cores.threads),
        )
        here = f"{self._cores.threads} threads on {describe_cores(self._cores.mask)}"
        logger.info("model %s, %d ranks, %s, MPI %s", directory, world.size, here, world.library)
        shows = self._shows.reading if world.is_leader else None
        with world.progress.loading():
            return Runtime(store, world, options, opening_since_s, shows(world.size) if shows else None)

    def _share_cores(self) -> CoreShare:
        """This rank's cores and threads: as rank 0 says for this host, else as asked, else its share."""
        settings, world = self.settings, self._job.world
        threads = threads_of_host(settings.threads_by_host, world.hostname) or settings.threads
        return share_cores(world, self._job.launcher, "keep" if settings.bind == "keep" else "auto", threads)


def choose_context(wanted: int | None, config: ModelConfig, default: int) -> int:
    """Positions of a sequence at most.

    Args:
        wanted: As asked; None takes the default, or less if the model has less.
        config: The model's sizes.
        default: Where nothing is asked.

    Raises:
        UsageError: More is asked than the model has.
    """
    if wanted is not None and wanted > config.max_positions:
        raise UsageError(f"context: {wanted} is more than the model's maximum of {config.max_positions} positions")
    return wanted or min(config.max_positions, default)


def threads_of_host(table: Mapping[str, int], host: str) -> int | None:
    """The entry of a host: by its whole name, else by the part before the first dot, on either side."""
    short = {name.partition(".")[0]: threads for name, threads in table.items()}
    return table.get(host) or table.get(host.partition(".")[0]) or (short.get(host) if "." not in host else None)
