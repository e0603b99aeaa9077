"""Beam search with the model: all living hypotheses are computed together, their caches forked where they part."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dist_moe.engine.requests.beams import BeamOptions, Beams
from dist_moe.engine.requests.candidates import CANDIDATES, Candidates
from dist_moe.engine.requests.prefix_index import blocks_of
from dist_moe.engine.requests.request import (
    Completion,
    FinishReason,
    Request,
    TokenLogprob,
    check_prompt,
    describe_fault,
)
from dist_moe.engine.requests.sampling import log_probabilities
from dist_moe.engine.steps.leader import Leader
from dist_moe.errors import UsageError
from dist_moe.kernels import NO_FAULT
from dist_moe.model.step import MAX_LOGIT_ROWS, Slice, Step


class BeamSearch:
    """One prompt's search; `run` is to be called once."""

    def __init__(self, leader: Leader, request: Request, options: BeamOptions, valid_vocabulary: int) -> None:
        """Prepare it.

        Args:
            leader: Runs the steps.
            request: A checked prompt, how many tokens at most, what ends a text, and how many logprobs to note. Nothing
                is drawn: its sampling options are not looked at.
            options: Width and length penalty.
            valid_vocabulary: Ids from here on are masked.

        Raises:
            UsageError: A bad prompt, or more beams than candidates of a token reach rank 0.
        """
        check_prompt(request.prompt_ids, leader.options.context, leader.config)
        self._leader, self._request, self._valid_vocabulary = leader, request, valid_vocabulary
        self._limit = min(request.max_tokens, leader.options.context - len(request.prompt_ids))
        self._at_limit: FinishReason = "length" if self._limit == request.max_tokens else "context"
        self._beams = Beams(options, self._limit, request.stop_ids)
        self._sequences: list[int] = []
        if self._beams.needed > CANDIDATES:
            raise UsageError(
                f"{options.beams} beams and {len(request.stop_ids)} tokens that end a text are more than the "
                f"{CANDIDATES} best tokens that a beam search looks at: use fewer beams"
            )

    def run(self, interrupted: Callable[[], bool]) -> list[Completion]:
        """Search; asks after each step whether to end with what there is.

        Returns:
            The best texts, best first, at most as many as there are beams; a single one with its error if a number
            overflowed.
        """
        if self._limit <= 0:
            return [Completion(finish_reason=self._at_limit)]
        try:
            for best, fault in self._rows():
                if fault is not None:
                    return [Completion(finish_reason="error", error=fault)]
                self._beams.advance(best, self._at_limit)
                if interrupted():
                    self._beams.end("interrupted")
            self._leader.crew.compare()
        finally:
            for sequence in self._sequences:
                self._leader.prefixes.release(sequence)
        return self._beams.completions()

    def _rows(self) -> Iterator[tuple[list[list[TokenLogprob]], str | None]]:
        """For each step that decides: the best next tokens of each living hypothesis, or what overflowed."""
        yield from self._prefill()
        computed = len(self._request.prompt_ids)
        while self._beams.live:
            self._move(computed)
            best: list[list[TokenLogprob]] = []
            fault: str | None = None
            for first in range(0, len(self._sequences), MAX_LOGIT_ROWS):
                group = range(first, min(first + MAX_LOGIT_ROWS, len(self._sequences)))
                last = [self._beams.live[i].tokens[-1].id for i in group]
                slices = tuple(
                    Slice(self._sequences[i], computed, (token,)) for i, token in zip(group, last, strict=True)
                )
                found, group_fault = self._step(slices, tuple(range(len(group))))
                best += found
                fault = fault or group_fault
            computed += 1
            yield best, fault

    def _prefill(self) -> Iterator[tuple[list[list[TokenLogprob]], str | None]]:
        leader, prompt = self._leader, self._request.prompt_ids
        self._sequences = [leader.prefixes.new_sequences()]
        resident, first = leader.prefixes.find(prompt[:-1])
        if first:
            leader.prefixes.fork(self._sequences[0], resident, first)
            leader.clock.reused_tokens += first
        leader.prefixes.make_room(blocks_of(len(prompt)))
        while first < len(prompt):
            ids = tuple(prompt[first : first + leader.options.prefill_chunk])
            first += len(ids)
            is_last = first == len(prompt)
            part = Slice(self._sequences[0], first - len(ids), ids)
            best, fault = self._step((part,), (len(ids) - 1,) if is_last else (), len(ids))
            if is_last or fault is not None:
                yield best, fault

    def _move(self, computed: int) -> None:
        """Give each living hypothesis its parent's cache: the first child takes it, the others a copy."""
        prefixes, before = self._leader.prefixes, self._sequences
        taken: set[int] = set()
        after: list[int] = []
        for text in self._beams.live:
            sequence = before[text.parent]
            if sequence in taken:
                copy = self._leader.prefixes.new_sequences()
                prefixes.fork(copy, sequence, computed)
                sequence = copy
            taken.add(sequence)
            after.append(sequence)
        for sequence in before:
            if sequence not in taken:
                prefixes.release(sequence)
        self._sequences = after

    def _step(
        self, slices: tuple[Slice, ...], rows: tuple[int, ...], prompt_tokens: int = 0
    ) -> tuple[list[list[TokenLogprob]], str | None]:
        leader = self._leader
        forks, released = leader.prefixes.take_orders()
        step = Step(
            slices=slices,
            logit_rows=rows,
            temperatures=(1.0,) * len(rows),
            full_logits=False,
            valid_vocabulary=self._valid_vocabulary,
            released=released,
            forks=forks,
            unit_sums=True,
        )
        with leader.clock.step(prompt_tokens, step.tokens - prompt_tokens):
            result = leader.crew.run(step)
            fault = int(result.fault_T.min())
            if fault != NO_FAULT:
                return [], describe_fault(fault, leader.config.layers)
            return [self._best(candidates) for candidates in result.candidates], None

    def _best(self, candidates: Candidates) -> list[TokenLogprob]:
        wanted = self._request.logprobs or 0
        count = max(self._beams.needed, wanted)
        logprobs = log_probabilities(self._leader.kernels, candidates, candidates.logits_C[:count])
        pairs = list(zip(candidates.ids_C[:count].tolist(), logprobs, strict=True))
        return [TokenLogprob(*pair, tuple(pairs[:wanted])) for pair in pairs[: self._beams.needed]]
