"""The engine: one model over all ranks. Rank 0 leads with generate() and logits(); the others follow in serve()."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing
from functools import partial

import numpy as np
import numpy.typing as npt

from dist_moe.engine.requests.beams import BeamOptions
from dist_moe.engine.requests.generation import Drawn, Generation
from dist_moe.engine.requests.prefix_index import PrefixIndex
from dist_moe.engine.requests.request import Completion, Request, check_prompt, describe_fault
from dist_moe.engine.requests.schedule import Part, Schedule, count_tokens
from dist_moe.engine.start.agreement import agree_on, log_records, own_record
from dist_moe.engine.start.exchange_rule import partition_rule
from dist_moe.engine.start.inventory import plan_from_inventory, take_inventory
from dist_moe.engine.start.loading import demand_of, load_model
from dist_moe.engine.start.memory import has_room
from dist_moe.engine.start.options import EngineOptions
from dist_moe.engine.start.read_ahead import ReadProgress
from dist_moe.engine.start.startup import agreed, log_links, open_exchange
from dist_moe.engine.steps.beam_search import BeamSearch
from dist_moe.engine.steps.crew import Crew, recorded_timeline
from dist_moe.engine.steps.leader import Leader
from dist_moe.engine.steps.prompt_cache import PromptCache
from dist_moe.engine.steps.text_reading import read_text
from dist_moe.engine.steps.worker import RowSink, StepResult, Worker
from dist_moe.engine.watch.accounts import Accounts
from dist_moe.engine.watch.scrub import start_scrub
from dist_moe.engine.watch.statistics import Clock, EngineStatistics, summarize
from dist_moe.engine.watch.timeline import Timeline
from dist_moe.kernels import NO_FAULT, Kernels
from dist_moe.model.step import MAX_LOGIT_ROWS
from dist_moe.parallel.cores import may_spin
from dist_moe.parallel.cost import WireShape
from dist_moe.parallel.world import World
from dist_moe.store.reader import Store

__all__ = ["EngineOptions", "Runtime"]

TokenCallback = Callable[[int, int], None]


class Runtime:
    """A model that is ready to run on all ranks of a world."""

    def __init__(
        self,
        store: Store,
        world: World,
        options: EngineOptions,
        loading_since_s: float | None = None,
        on_reading: ReadProgress | None = None,
    ) -> None:
        """Map the weights and agree with the other ranks; collective.

        Args:
            store: An open store.
            world: All ranks.
            options: How to run.
            loading_since_s: When loading began, on the perf_counter clock, for the statistics; None is now.
            on_reading: Told (bytes done, bytes in all) while this rank's weights are read from the disk or copied.

        Raises:
            AgreedError: Some rank cannot take part; raised on all ranks alike.
        """
        started_s = time.perf_counter() if loading_since_s is None else loading_since_s
        self.config = store.config
        self.is_leader, self.hosts = world.is_leader, world.hosts
        spin = may_spin(world, options.threads, os.environ)
        self.kernels = agreed(world, "start", lambda: Kernels(options.threads, options.isa, spin))
        if options.bind is not None:
            self.kernels.bind(options.bind)
        self._options = options
        self._step_tokens = max(options.prefill_chunk, MAX_LOGIT_ROWS)
        records = agree_on(world, own_record(store, self.kernels, world.library, options))
        if world.is_leader:
            log_records(records, world.hosts)
        exchange = open_exchange(world, spin, os.environ, options.wire)
        log_links(exchange, options.wire, self.config.layers, self.config.model_dim)
        inventory = agreed(world, "start", lambda: take_inventory(world, store, records))
        demand = demand_of(options, self._step_tokens)
        fits = partial(has_room, world, store.manifest, demand, records)
        job = agreed(
            world, "start", lambda: plan_from_inventory(world, store.manifest, inventory, options.layout, fits)
        )
        self.layout = job.layout
        self.model = load_model(exchange, store, job, self.kernels, options, demand, records, on_reading)
        self._scrubber = start_scrub(world, self.model.weights, job.plans[world.rank]) if options.scrub else None
        worker = Worker(self.model, exchange, self._scrubber)
        shape = WireShape.of(self.config, store.manifest.formats.quantized)
        partitions = partition_rule(options.step_exchange, shape, world.nodes, exchange.link_costs)
        self._crew = Crew(worker, exchange, self._step_tokens, self._measure, partitions)
        self._prefixes = PrefixIndex(options.resident_positions)
        self.prompt_cache = PromptCache(self._crew, self._prefixes, store.manifest, options.kv)
        self._clock = Clock(self.model.stopwatch, exchange.ledger)
        self._leader = Leader(self._crew, self.kernels, self._prefixes, self._clock, options, self.config)
        self._load_s = time.perf_counter() - started_s

    @property
    def context(self) -> int:
        """Positions of a sequence at most."""
        return self._options.context

    @property
    def crew(self) -> Crew:
        """The orders that `generate` and `logits` are made of, for measurements; to be used on rank 0 alone."""
        return self._crew

    @property
    def busy(self) -> bool:
        """On rank 0: an error left a step unfinished, so the other ranks stand in it and can only be ended."""
        return self._crew.busy

    def serve(self) -> None:
        """Follow rank 0 until it stops; on the other ranks. Errors as of `generate`."""
        while self.follow() is not None:
            pass

    def follow(self) -> str | None:
        """Follow rank 0 until it says something, which is returned, or stops; errors as of `generate`."""
        text = self._crew.follow()
        if text is None:
            self._close()
        return text

    def say(self, text: str) -> None:
        """Let the other ranks return from `follow` with a text; on rank 0 alone."""
        self._crew.say(text)

    def stop(self) -> None:
        """Let the followers return from serve(); on rank 0 alone."""
        self._crew.stop()
        self._close()

    def finish_scrub(self) -> None:
        """Where weights are scrubbed, check those that no idle time was found for; on rank 0 alone.

        Raises:
            AgreedError: Some rank found damaged weights; raised on all ranks alike.
        """
        if self._scrubber is not None:
            self._crew.finish_scrub()

    def accounts(self) -> Accounts:
        """All ranks' times and bytes so far; on rank 0 alone."""
        return self._crew.report()

    def timeline(self) -> AbstractContextManager[Timeline]:
        """Watch what each rank does inside a block; on rank 0 alone. The timeline is complete after the block."""
        return recorded_timeline(self._crew)

    def statistics(self) -> EngineStatistics:
        """The run so far over all ranks; on rank 0 alone."""
        return summarize(self._load_s, self._clock, self._crew.report())

    def generate(
        self,
        requests: Sequence[Request],
        on_token: TokenCallback | None = None,
        valid_vocabulary: int | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> list[Completion]:
        """Continue sequences, all of them together in shared steps; on rank 0 alone.

        Args:
            requests: What to continue.
            on_token: Told each token as it is drawn: (index of the request, token id).
            valid_vocabulary: Ids from here on are never drawn (a model's table may be longer than its tokenizer's).
            interrupted: Asked after each step whether to end all of them now.

        Returns:
            One completion per request.

        Raises:
            UsageError: An empty prompt, an id beyond the vocabulary, or a prompt longer than the context.
            AgreedError: A rank holds other numbers than the others, or found damaged weights; raised on all ranks.
        """
        generation = self.start(requests, valid_vocabulary)
        with closing(generation.steps()) as steps:
            for drawn in steps:
                if on_token is not None:
                    for token in drawn:
                        on_token(*token)
                if interrupted():
                    generation.interrupt()
        return generation.completions

    def start(self, requests: Sequence[Request], valid_vocabulary: int | None = None) -> Generation:
        """Check and queue sequences to continue, for who pulls their steps one by one; on rank 0 alone.

        Args and errors as of `generate`; those that steps meet are raised by the generation.
        """
        for request in requests:
            check_prompt(request.prompt_ids, self._options.context, self.config)
        valid = self._valid_vocabulary(valid_vocabulary)
        schedule = Schedule(
            requests,
            self._prefixes.new_sequences(len(requests)),
            context=self._options.context,
            step_tokens=self._step_tokens,
            prefill_chunk=self._options.prefill_chunk,
            prefixes=self._prefixes,
        )
        return Generation(schedule, lambda: self._steps(schedule, valid))

    def beam_search(
        self,
        request: Request,
        options: BeamOptions,
        valid_vocabulary: int | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> list[Completion]:
        """The continuations of the highest score, best first; on rank 0 alone. See BeamSearch; errors as `generate`."""
        search = BeamSearch(self._leader, request, options, self._valid_vocabulary(valid_vocabulary))
        self._compare_after_idling()
        return search.run(interrupted)

    def logits(self, ids: Sequence[int], sink: RowSink | None, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Compute the logits at every position of a text; on rank 0 alone.

        Args:
            ids: The text.
            sink: Gets f32 [n, V] for the next n positions, valid only during the call; None: only the layers run.
            interrupted: Asked after each step whether to give up.

        Raises:
            Interrupted: `interrupted` said so.
            UsageError: As in `generate`.
            DistMoeError: A NaN or overflow in the model.
            AgreedError: As `generate`.
        """
        check_prompt(ids, self._options.context, self.config)
        self._compare_after_idling()
        read_text(self._leader, ids, sink, interrupted)

    # ---- steps ----

    def _valid_vocabulary(self, wanted: int | None) -> int:
        return self.config.vocabulary if wanted is None else min(wanted, self.config.vocabulary)

    def _steps(self, schedule: Schedule, valid: int) -> Generator[Drawn, None, None]:
        """Run steps until all requests are finished; yields the tokens of each, (index of the request, token id)."""
        self._compare_after_idling()
        try:
            while parts := schedule.next_parts():
                drawn: Drawn = []
                with self._clock.step(*count_tokens(parts)):
                    result = self._crew.run(schedule.step(parts, valid))
                    for part in parts:
                        self._take(schedule, part, result, valid, drawn)
                yield drawn
            self._crew.compare()
        finally:
            schedule.abandon()
            self._clock.reused_tokens += sum(completion.reused_tokens for completion in schedule.completions)

    def _compare_after_idling(self) -> None:
        """What was found in idle time ends the job before it spoils an answer."""
        if self._scrubber is not None:
            self._crew.compare()

    def _measure(self, argument: int) -> npt.NDArray[np.float64]:
        """This rank's part of a measurement (`bench_machine.Measurement`)."""
        from dist_moe.engine.measuring.bench_machine import Measurer  # nobody else's start pays for it

        return Measurer(self.model, self._options.kv)(argument)

    def _close(self) -> None:
        if self._scrubber is not None:
            self._scrubber.close()

    def _take(self, schedule: Schedule, part: Part, result: StepResult, valid: int, drawn: Drawn) -> None:
        """Book one part of a finished step: its fault, or its next token."""
        active, request = part.active, part.active.request
        active.cached += part.count
        fault = int(result.fault_T[part.first : part.first + part.count].min())
        if fault != NO_FAULT:
            schedule.finish(active, "error", describe_fault(fault, self.config.layers))
            return
        if part.row is None:
            return
        row = part.row
        completion = active.completion
        token = active.sampler.draw(
            self.kernels, completion, result.candidates[row], lambda: self._crew.fetch_row(row), valid
        )
        if request.on_logits is not None:
            request.on_logits(result.full_logits[row])
        drawn.append((active.index, token))
        if token in request.stop_ids:
            schedule.finish(active, "stop")
        elif len(completion.ids) == active.limit:
            schedule.finish(active, "length" if active.limit == request.max_tokens else "context")
