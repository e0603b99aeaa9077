"""Continuous batching: which tokens of which sequences make the next step. Pure bookkeeping, on rank 0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dist_moe.engine.requests.prefix_index import PrefixIndex, blocks_of, common_prefix
from dist_moe.engine.requests.request import Completion, FinishReason, Request
from dist_moe.engine.requests.sampling import Sampler
from dist_moe.kernels import BLOCK_POSITIONS
from dist_moe.model.step import MAX_LOGIT_ROWS, Slice, Step

# A request waits for another one to compute what both begin with if that is at least so much; less is computed sooner.
LEAST_SHARED = BLOCK_POSITIONS
MOST_COMPARED = 16  # earlier requests, so that thousands of equal ones are not all compared with each other


@dataclass
class Active:
    """A request in progress: `cached` of its tokens are in the KV cache; it waits until `source` has `shared` there."""

    index: int
    sequence: int
    request: Request
    limit: int  # tokens to generate at most
    completion: Completion
    cached: int = 0
    source: Active | None = None
    shared: int = 0
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.request)

    @property
    def length(self) -> int:
        """Prompt and generated tokens."""
        return len(self.request.prompt_ids) + len(self.completion.ids)

    @property
    def prefilling(self) -> bool:
        """Whether some of the prompt is still to be computed."""
        return self.cached < len(self.request.prompt_ids)

    def slice(self, tokens: int) -> Slice:
        """Its next `tokens` tokens."""
        prompt, first, stop = self.request.prompt_ids, self.cached, self.cached + tokens
        own = self.completion.ids[max(0, first - len(prompt)) : max(0, stop - len(prompt))]
        return Slice(self.sequence, first, (*prompt[first:stop], *own))

    def cached_ids(self) -> tuple[int, ...]:
        """The tokens whose K and V are in the cache."""
        return (*self.request.prompt_ids, *self.completion.ids)[: self.cached]


@dataclass(frozen=True)
class Part:
    """One sequence's place in a step: its tokens [first, first + count) of the batch, and its logit row if any."""

    active: Active
    first: int
    count: int
    row: int | None


class Schedule:
    """The requests of one call, and the steps that they become.

    Decodes come first in a step, then prefill chunks in the order of the requests, as many as fit. What a prompt begins
    with is computed once: it is forked from a resident sequence, or from an earlier request of the same call.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        first_sequence: int,
        *,
        context: int,
        step_tokens: int,
        prefill_chunk: int,
        prefixes: PrefixIndex | None = None,
    ) -> None:
        """Queue the requests.

        Args:
            requests: At least one prompt token each, at most `context`.
            first_sequence: The KV cache's name of the first request; the others follow.
            context: Prompt and generated tokens of a sequence at most.
            step_tokens: Tokens of a step at most.
            prefill_chunk: Prompt tokens of one sequence in a step at most.
            prefixes: What finished sequences left; None: nothing, and nothing is kept.
        """
        self._prefixes = PrefixIndex(0) if prefixes is None else prefixes
        self._step_tokens = step_tokens
        self._prefill_chunk = prefill_chunk
        self._running: list[Active] = []
        self._by_beginning: dict[tuple[int, ...], list[Active]] = {}
        self._started = False
        self._turn = 0
        self.completions = [Completion() for _ in requests]
        for index, request in enumerate(requests):
            limit = min(request.max_tokens, context - len(request.prompt_ids))
            active = Active(index, first_sequence + index, request, limit, self.completions[index])
            self._running.append(active)
            if limit <= 0:
                self.finish(active, "length" if request.max_tokens <= 0 else "context")

    def next_parts(self) -> list[Part]:
        """The next step's parts; empty when every request is finished."""
        self._look_for_prefixes()
        for active in self._running:
            if active.source is not None:
                self._stop_waiting(active, active.source)
        parts: list[Part] = []
        tokens = rows = 0
        for active in self._by_phase():
            count = min(active.length - active.cached, self._prefill_chunk, self._step_tokens - tokens)
            needs_row = active.cached + count == active.length
            if count == 0 or (needs_row and rows == MAX_LOGIT_ROWS):
                continue
            parts.append(Part(active, tokens, count, rows if needs_row else None))
            tokens += count
            rows += needs_row
        return parts

    def step(self, parts: Sequence[Part], valid_vocabulary: int) -> Step:
        """The step that computes these parts, after the orders that have gathered for KV caches."""
        if len(self._prefixes):
            computed = sum(blocks_of(part.active.cached + part.count) - blocks_of(part.active.cached) for part in parts)
            self._prefixes.make_room(computed + sum(blocks_of(active.cached) for active in self._running))
        forks, released = self._prefixes.take_orders()
        wanted = [part for part in parts if part.row is not None]
        return Step(
            slices=tuple(part.active.slice(part.count) for part in parts),
            logit_rows=tuple(part.first + part.count - 1 for part in wanted),
            temperatures=tuple(part.active.request.sampling.temperature for part in wanted),
            full_logits=any(part.active.request.on_logits is not None for part in wanted),
            valid_vocabulary=valid_vocabulary,
            released=released,
            forks=forks,
            unit_sums=any(part.active.request.logprobs is not None for part in wanted),
        )

    def finish(self, active: Active, reason: FinishReason, error: str | None = None) -> None:
        """End a request."""
        active.completion.finish_reason = reason
        active.completion.error = error
        self._running.remove(active)
        for waiting in self._running:
            if waiting.source is active:
                self._stop_waiting(waiting, active)
        if reason == "error":
            self._prefixes.release(active.sequence)
        else:
            self._prefixes.keep(active.sequence, active.cached_ids())

    def end(self, index: int, reason: FinishReason) -> None:
        """End the request of this index if it is still in progress."""
        for active in [active for active in self._running if active.index == index]:
            self.finish(active, reason)

    def interrupt(self) -> None:
        """End all requests that are still in progress."""
        for active in list(self._running):
            self.finish(active, "interrupted")

    def abandon(self) -> None:
        """Schedule nothing more; what the requests in progress have computed so far is kept."""
        for active in self._running:
            self._prefixes.keep(active.sequence, active.cached_ids())
        self._running.clear()

    def _look_for_prefixes(self) -> None:
        """Before the first step, when nothing else can come in between any more."""
        if self._started:
            return
        self._started = True
        for active in self._running:
            self._fork_resident(active)
            self._wait_for_earlier(active)

    def _fork_resident(self, active: Active) -> None:
        """Begin with what a resident sequence holds, but for the prompt's last token: it gives the logits."""
        resident, positions = self._prefixes.find(active.request.prompt_ids[:-1])
        if positions:
            self._prefixes.fork(active.sequence, resident, positions)
        active.cached = active.completion.reused_tokens = positions

    def _wait_for_earlier(self, active: Active) -> None:
        """Wait for the earlier request that will have most in common, if it is worth it."""
        prompt = active.request.prompt_ids
        alike = self._by_beginning.setdefault(prompt[:LEAST_SHARED], [])
        for earlier in alike:
            shared = common_prefix(_array(earlier.request.prompt_ids), _array(prompt[:-1]))
            if shared >= max(active.cached, active.shared) + LEAST_SHARED:
                active.source, active.shared = earlier, shared
        if len(alike) < MOST_COMPARED:
            alike.append(active)

    def _stop_waiting(self, active: Active, source: Active) -> None:
        """Fork from the request that computes the same beginning once it has it; go on alone if it ended before."""
        if source.completion.finish_reason != "error" and source.cached >= active.shared:
            self._prefixes.fork(active.sequence, source.sequence, active.shared)
            active.cached = active.completion.reused_tokens = active.shared
            active.source = None
        elif source.completion.finish_reason is not None:
            active.source = None

    def _by_phase(self) -> Iterator[Active]:
        """Decodes, then prefills; sequences beyond the rows of a step take turns."""
        running = [active for active in self._running if active.source is None]
        if len(running) > MAX_LOGIT_ROWS:
            self._turn = (self._turn + MAX_LOGIT_ROWS) % len(running)
            running = (running[self._turn :] + running[: self._turn])[:MAX_LOGIT_ROWS]
        yield from (active for active in running if not active.prefilling)
        yield from (active for active in running if active.prefilling)


def count_tokens(parts: Sequence[Part]) -> tuple[int, int]:
    """Prompt tokens and decoded tokens of a step."""
    prompt = sum(part.count for part in parts if part.active.prefilling)
    return prompt, sum(part.count for part in parts) - prompt


def _array(ids: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.array(ids, dtype=np.int32)
