"""A model that is open on all ranks: its life, and how calls reach the other ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

from dist_moe.engine.calls import Calls
from dist_moe.engine.opening import Acceptor, Opening, Shows, choose_context
from dist_moe.engine.requests.questions import TextSide
from dist_moe.engine.runtime import Runtime
from dist_moe.engine.start.job import Job
from dist_moe.engine.start.settings import DEFAULT_CONTEXT, Settings
from dist_moe.errors import DistMoeError, UsageError
from dist_moe.model_config import ModelConfig
from dist_moe.parallel.entry import end_job
from dist_moe.parallel.mpi import running_mpi
from dist_moe.parallel.world import AgreedError
from dist_moe.store.models import ModelSource

Entered = TypeVar("Entered", bound="OpenModel")
Made = TypeVar("Made")


class OpenModel:
    """What `Engine` is made of below its calls.

    Attributes:
        config: The model's sizes.
        is_leader: Whether this is rank 0.
    """

    def __init__(self, job: Job, settings: Settings, find: Callable[[], ModelSource], shows: Shows) -> None:
        """Find the model and check the settings; collective.

        Args:
            job: The ranks.
            settings: As the arguments of `Engine`.
            find: Which model.
            shows: Who is told how the start goes.

        Raises:
            AgreedError: There is no such model, or a setting does not fit it or the machines.
        """
        self._job = job
        self._opening = Opening(job, settings, find, shows)
        self._runtime: Runtime | None = None
        self._calls: Calls | None = None
        self._closed = False
        self._generations: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()
        self.config: ModelConfig = self._opening.config
        self.is_leader: bool = job.world.is_leader

    def load(self, context: int | None = None, accept: Acceptor | None = None) -> None:
        """Read the weights, unless that is done; collective.

        Args:
            context: Instead of the one that the engine was made with.
            accept: On rank 0: told the store before its weights are read, to refuse it.

        Raises:
            AgreedError: Some rank cannot take part: memory, a damaged file.
            UsageError: The context is more than the model's maximum.
        """
        if self._closed:
            raise UsageError("this engine is closed: make a new one")
        if self._runtime is not None:
            return
        with own_errors():
            with self._job.world.together("starting"):
                positions = choose_context(context or self._opening.settings.context, self.config, DEFAULT_CONTEXT)
            self._runtime = self._opening.open(positions, accept)
        self._calls = Calls(self._runtime, self._job.world.size)

    def close(self, *, finish: bool = True) -> None:
        """End open generations, let the other ranks go, and free the threads; collective. Twice is no error.

        Args:
            finish: Where weights are scrubbed, check those first that no idle time was found for.

        Raises:
            AgreedError: Weights were scrubbed, and some are damaged.
        """
        runtime, calls = self._runtime, self._calls
        if self._closed or runtime is None or calls is None:
            self._closed = True
            return
        for generation in list(self._generations):
            generation.close()
        self._closed = True
        try:
            if not self.is_leader:
                calls.follow_end()
            elif not runtime.busy:
                if finish:
                    runtime.finish_scrub()
                runtime.stop()
        finally:
            self._job.leave()
            runtime.kernels.close()

    def __enter__(self: Entered) -> Entered:
        """Load the model and return the engine."""
        self.load()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; an error that other ranks may not have met ends the whole job, as they would wait for ever."""
        agreed = error is None or isinstance(error, SystemExit) or (isinstance(error, DistMoeError) and error.agreed)
        if error is not None and not agreed and self._job.world.size > 1:
            self._job.leave()
            end_job(error)
        if isinstance(error, AgreedError):
            self._job.leave()
            self._closed = True
        else:
            self.close(finish=error is None)
            if self._runtime is not None and not self._runtime.busy:
                # Open MPI's launcher can crash when a rank ends the job while another, gone on, is in MPI_Finalize.
                self._job.world.sleep_until_all()

    @property
    def runtime(self) -> Runtime:
        """The loaded model below this class, for measurements and probes; its calls are for `lead`.

        Raises:
            UsageError: The weights are not loaded.
        """
        if self._runtime is None:
            raise UsageError("the weights are not loaded: use the engine in a with block, or call load()")
        return self._runtime

    @property
    def text(self) -> TextSide:
        """The model's tokenizer, chat template and generation settings; on rank 0.

        Raises:
            UsageError: On another rank.
        """
        if self._opening.text is None:
            raise UsageError("rank 0 alone has the model's text files: ask `if engine.is_leader`")
        return self._opening.text

    # ---- calls ----

    def _together(
        self, name: str, work: Callable[[], Made], encode: Callable[[Made], Any], decode: Callable[[Any], Made]
    ) -> Made:
        return self._ready().together(name, work, encode, decode)

    def _ready(self) -> Calls:
        self.load()
        assert self._calls is not None
        assert self._runtime is not None
        if self._runtime.busy:
            raise UsageError("an earlier call was cut off in the middle of a step: make a new engine")
        return self._calls


@contextmanager
def own_errors() -> Iterator[None]:
    """Where one rank is all there are, let its error be raised as it is."""
    try:
        yield
    except AgreedError as error:
        if isinstance(error.__cause__, DistMoeError) and running_mpi() is None:
            raise error.__cause__ from None
        raise
