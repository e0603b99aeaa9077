"""Continuous batching: which tokens of which sequences make the next step. Pure bookkeeping, on rank 0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dist_moe.engine.request import Completion, FinishReason, Request
from dist_moe.engine.sampling import Sampler
from dist_moe.model.step import MAX_LOGIT_ROWS, Slice, Step


@dataclass
class Active:
    """A request in progress: `cached` of its tokens are in the KV cache."""

    index: int
    sequence: int
    request: Request
    limit: int  # tokens to generate at most
    completion: Completion
    cached: int = 0
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


@dataclass(frozen=True)
class Part:
    """One sequence's place in a step: its tokens [first, first + count) of the batch, and its logit row if any."""

    active: Active
    first: int
    count: int
    row: int | None


class Schedule:
    """The requests of one call, and the steps that they become.

    Decodes come first in a step, then prefill chunks in the order of the requests, as many as fit.
    """

    def __init__(
        self, requests: Sequence[Request], first_sequence: int, *, context: int, step_tokens: int, prefill_chunk: int
    ) -> None:
        """Queue the requests.

        Args:
            requests: At least one prompt token each, at most `context`.
            first_sequence: The KV cache's name of the first request; the others follow.
            context: Prompt and generated tokens of a sequence at most.
            step_tokens: Tokens of a step at most.
            prefill_chunk: Prompt tokens of one sequence in a step at most.
        """
        self._step_tokens = step_tokens
        self._prefill_chunk = prefill_chunk
        self._running: list[Active] = []
        self._released: list[int] = []
        self._turn = 0
        self.completions = [Completion() for _ in requests]
        for index, request in enumerate(requests):
            limit = min(request.max_tokens, context - len(request.prompt_ids))
            active = Active(index, first_sequence + index, request, limit, self.completions[index])
            self._running.append(active)
            if limit <= 0:
                self.finish(active, "length")

    def next_parts(self) -> list[Part]:
        """The next step's parts; empty when every request is finished."""
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

    def step(self, parts: Sequence[Part], valid_vocabulary: int, released: tuple[int, ...]) -> Step:
        """The step that computes these parts and frees the caches of `released` sequences."""
        wanted = [part for part in parts if part.row is not None]
        return Step(
            slices=tuple(part.active.slice(part.count) for part in parts),
            logit_rows=tuple(part.first + part.count - 1 for part in wanted),
            temperatures=tuple(part.active.request.sampling.temperature for part in wanted),
            full_logits=any(part.active.request.on_logits is not None for part in wanted),
            valid_vocabulary=valid_vocabulary,
            released=released,
            unit_sums=any(part.active.request.logprobs is not None for part in wanted),
        )

    def finish(self, active: Active, reason: FinishReason, error: str | None = None) -> None:
        """End a request."""
        active.completion.finish_reason = reason
        active.completion.error = error
        self._running.remove(active)
        self._released.append(active.sequence)

    def interrupt(self) -> None:
        """End all requests that are still in progress."""
        for active in list(self._running):
            self.finish(active, "interrupted")

    def take_released(self) -> tuple[int, ...]:
        """The sequences that finished since the last call."""
        released, self._released = tuple(self._released), []
        return released

    def abandon(self) -> tuple[int, ...]:
        """Every sequence that still holds a cache; nothing more is scheduled."""
        left = (*self.take_released(), *(active.sequence for active in self._running))
        self._running.clear()
        return left

    def _by_phase(self) -> Iterator[Active]:
        """Decodes, then prefills; sequences beyond the rows of a step take turns."""
        running = self._running
        if len(running) > MAX_LOGIT_ROWS:
            self._turn = (self._turn + MAX_LOGIT_ROWS) % len(running)
            running = (running[self._turn :] + running[: self._turn])[:MAX_LOGIT_ROWS]
        yield from (active for active in running if not active.prefilling)
        yield from (active for active in running if active.prefilling)
