"""The engine: one model over all ranks. Rank 0 leads with generate() and logits(); the others follow in serve()."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from dist_moe.engine.agreement import agree_on, log_records, own_record
from dist_moe.engine.crew import Crew
from dist_moe.engine.loading import load_model
from dist_moe.engine.options import EngineOptions
from dist_moe.engine.read_ahead import ReadProgress
from dist_moe.engine.request import Completion, Request, describe_fault
from dist_moe.engine.sampling import draw_token
from dist_moe.engine.schedule import Part, Schedule
from dist_moe.engine.scrub import start_scrub
from dist_moe.engine.startup import agreed, choose_layout, open_exchange
from dist_moe.engine.statistics import Clock, EngineStatistics, summarize
from dist_moe.engine.worker import RowSink, StepResult, Worker
from dist_moe.errors import DistMoeError, Interrupted, UsageError
from dist_moe.kernels import NO_FAULT, Kernels
from dist_moe.model.step import MAX_LOGIT_ROWS, Slice, Step
from dist_moe.parallel.cores import may_spin
from dist_moe.parallel.plan import Plan, make_plan
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
        self.is_leader = world.is_leader
        spin = may_spin(world, options.threads, os.environ)
        self.kernels = agreed(world, "start", lambda: Kernels(options.threads, options.isa, spin))
        if options.bind is not None:
            self.kernels.bind(options.bind)
        self._options = options
        self._step_tokens = max(options.prefill_chunk, MAX_LOGIT_ROWS)
        records = agree_on(world, own_record(store, self.kernels, world.library, options))
        if world.is_leader:
            log_records(records, world.hosts)
        exchange = open_exchange(world, spin, os.environ)
        self.layout = agreed(world, "start", lambda: choose_layout(store, exchange, options.layout))
        plans = agreed(world, "start", lambda: [self._plan(rank, world.size) for rank in range(world.size)])
        self.model = load_model(exchange, store, plans, self.kernels, options, self._step_tokens, records, on_reading)
        self._scrubber = start_scrub(world, self.model.weights, plans[world.rank]) if options.scrub else None
        worker = Worker(self.model, exchange, world.size, self._scrubber)
        self._crew = Crew(worker, exchange, self._step_tokens, self._measure)
        self._next_sequence = 0
        self._released: tuple[int, ...] = ()
        self._clock = Clock()
        self._load_s = time.perf_counter() - started_s

    @property
    def crew(self) -> Crew:
        """The orders that `generate` and `logits` are made of, for measurements; to be used on rank 0 alone."""
        return self._crew

    @property
    def busy(self) -> bool:
        """On rank 0: an error left a step unfinished, so the other ranks stand in it and can only be ended."""
        return self._crew.busy

    def serve(self) -> None:
        """Follow rank 0 until it stops; on the other ranks.

        Raises:
            AgreedError: As `generate`.
        """
        self._crew.follow()
        self._close()

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
        for request in requests:
            self._check_prompt(request.prompt_ids)
        valid = self.config.vocabulary if valid_vocabulary is None else min(valid_vocabulary, self.config.vocabulary)
        schedule = Schedule(
            requests,
            self._next_sequence,
            context=self._options.context,
            step_tokens=self._step_tokens,
            prefill_chunk=self._options.prefill_chunk,
        )
        self._next_sequence += len(requests)
        self._compare_after_idling()
        try:
            while parts := schedule.next_parts():
                with self._clock.step(*_count_tokens(parts)):
                    result = self._crew.run(schedule.step(parts, valid, self._take_released()))
                    for part in parts:
                        self._take(schedule, part, result, valid, on_token)
                if interrupted():
                    schedule.interrupt()
                self._released += schedule.take_released()
            self._crew.compare()
        finally:
            self._released += schedule.abandon()
        return schedule.completions

    def logits(self, ids: Sequence[int], sink: RowSink, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Compute the logits at every position of a text; on rank 0 alone.

        Args:
            ids: The text.
            sink: Gets f32 [n, V] for the next n positions, valid only during the call.
            interrupted: Asked after each step whether to give up.

        Raises:
            Interrupted: `interrupted` said so.
            UsageError: As in `generate`.
            DistMoeError: A NaN or overflow in the model.
            AgreedError: As `generate`.
        """
        self._check_prompt(ids)
        self._compare_after_idling()
        sequence, self._next_sequence = self._next_sequence, self._next_sequence + 1
        try:
            for first in range(0, len(ids), self._options.prefill_chunk):
                chunk = Slice(sequence, first, tuple(ids[first : first + self._options.prefill_chunk]))
                with self._clock.step(len(chunk.ids), 0):
                    result = self._crew.run(self._logits_step(chunk), sink)
                if interrupted():
                    raise Interrupted(f"interrupted after {first + len(chunk.ids)} of {len(ids)} tokens")
                self._refuse_faults(result, first)
            self._crew.compare()
        finally:
            self._released += (sequence,)

    # ---- start ----

    def _plan(self, rank: int, ranks: int) -> Plan:
        return make_plan(
            heads=self.config.heads,
            heads_per_kv_head=self.config.heads_per_kv_head,
            vocabulary=self.config.vocabulary,
            rank=rank,
            ranks=ranks,
            layout=self.layout,
        )

    def _check_prompt(self, ids: Sequence[int]) -> None:
        if not ids:
            raise UsageError("the prompt has no tokens: give at least one")
        if len(ids) > self._options.context:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the context {self._options.context}: shorten it or raise --ctx "
                f"(the model allows {self.config.max_positions})"
            )
        beyond = next((i for i in ids if not 0 <= i < self.config.vocabulary), None)
        if beyond is not None:
            raise UsageError(f"token id {beyond} is outside the model's vocabulary: 0 to {self.config.vocabulary - 1}")

    # ---- steps ----

    def _compare_after_idling(self) -> None:
        """What was found in idle time ends the job before it spoils an answer."""
        if self._scrubber is not None:
            self._crew.compare()

    def _measure(self, argument: int) -> npt.NDArray[np.float64]:
        """This rank's part of a measurement (`bench_machine.Measurement`)."""
        from dist_moe.engine.bench_machine import Measurer  # nobody else's start pays for it

        return Measurer(self.model, self._options.kv)(argument)

    def _close(self) -> None:
        if self._scrubber is not None:
            self._scrubber.close()

    def _refuse_faults(self, result: StepResult, first_position: int) -> None:
        fault = int(result.fault_T.min())
        if fault != NO_FAULT:
            position = first_position + int(result.fault_T.argmin())
            raise DistMoeError(f"position {position}: {describe_fault(fault, self.config.layers)}")

    def _take_released(self) -> tuple[int, ...]:
        released, self._released = self._released, ()
        return released

    def _logits_step(self, chunk: Slice) -> Step:
        return Step(
            slices=(chunk,),
            logit_rows=tuple(range(len(chunk.ids))),
            temperatures=(),
            full_logits=True,
            valid_vocabulary=self.config.vocabulary,
            released=self._take_released(),
        )

    def _take(
        self, schedule: Schedule, part: Part, result: StepResult, valid: int, on_token: TokenCallback | None
    ) -> None:
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
        token = draw_token(
            self.kernels,
            request.sampling,
            active.length,
            result.candidates[row],
            lambda: self._crew.fetch_row(row),
            valid,
        )
        completion = active.completion
        completion.ids.append(token)
        if request.on_logits is not None:
            request.on_logits(result.full_logits[row])
        if on_token is not None:
            on_token(active.index, token)
        if token in request.stop_ids:
            schedule.finish(active, "stop")
        elif len(completion.ids) == active.limit:
            schedule.finish(active, "length")


def _count_tokens(parts: Sequence[Part]) -> tuple[int, int]:
    """Prompt tokens and decoded tokens of a step."""
    prompt = sum(part.count for part in parts if part.active.prefilling)
    return prompt, sum(part.count for part in parts) - prompt
