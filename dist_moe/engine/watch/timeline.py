"""What every rank did and when, on rank 0's clock: the newest steps of a run, for a picture of them.

R ranks · n exchanges · M marks
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.engine.watch.accounts import SplitNotes
from dist_moe.model.stopwatch import Marks, Part
from dist_moe.parallel.clocks import ClockSample, to_leaders_clock
from dist_moe.parallel.ledger import Kind, layer_of

Int64s = npt.NDArray[np.int64]

# Spans of all ranks together: some 150 bytes each as text, and what a viewer still opens at once.
MOST_SPANS = 1_000_000


@dataclass(frozen=True)
class Span:
    """Something that one rank did.

    Attributes:
        name: What.
        category: step, compute, exchange or wait.
        rank: Who.
        begin_ns, end_ns: When, on rank 0's clock.
        facts: Figures that belong to it.
    """

    name: str
    category: str
    rank: int
    begin_ns: int
    end_ns: int
    facts: Mapping[str, int | float]


@dataclass(frozen=True)
class TimelineStep:
    """One step with the exchanges since the step before it; arrays as in `Notes` and `Marks`, of all ranks."""

    number: int
    prompt_tokens: int
    decoded_tokens: int
    begin_R: Int64s
    end_R: Int64s
    drawn_ns: int
    kind_n: Int64s
    layer_n: Int64s
    inside_n: npt.NDArray[np.bool_]
    begin_Rn: Int64s
    end_Rn: Int64s
    wait_Rn: Int64s
    sent_Rn: Int64s
    part_M: Int64s
    layer_M: Int64s
    time_RM: Int64s

    @property
    def first_ns(self) -> int:
        """When its first span begins."""
        came_Rn = (self.begin_Rn + self.wait_Rn)[:, ~self.inside_n]
        return min(int(self.begin_R.min()), int(came_Rn.min(initial=1 << 62)))

    @property
    def span_count(self) -> int:
        """Spans that it makes at most."""
        ranks = len(self.begin_R)
        return ranks * (1 + 2 * len(self.kind_n) + len(self.part_M)) + 1

    def spans(self) -> Iterator[Span]:
        """Rank by rank, each after what it lies in."""
        for rank in range(len(self.begin_R)):
            yield from self._outside(rank)
            tokens = {"prompt tokens": self.prompt_tokens, "decoded tokens": self.decoded_tokens}
            begin_ns, end_ns = int(self.begin_R[rank]), int(self.end_R[rank])
            yield Span(f"step {self.number}", "step", rank, begin_ns, end_ns, tokens)
            yield from self._parts(rank)
            for n in np.flatnonzero(self.inside_n).tolist():
                yield from self._exchange(rank, n)
        if self.drawn_ns > self.end_R[0]:
            yield Span("draw and print", "compute", 0, int(self.end_R[0]), self.drawn_ns, {})

    def _outside(self, rank: int) -> Iterator[Span]:
        """The exchanges before the step; a follower's idle time is left out."""
        for n in np.flatnonzero(~self.inside_n).tolist():
            begin_ns, end_ns = int(self.begin_Rn[rank, n] + self.wait_Rn[rank, n]), int(self.end_Rn[rank, n])
            facts = {"bytes": int(self.sent_Rn[rank, n])}
            yield Span(Kind(int(self.kind_n[n])).label, "exchange", rank, begin_ns, end_ns, facts)

    def _parts(self, rank: int) -> Iterator[Span]:
        before_ns = int(self.begin_R[rank])
        for part, layer, time_ns in zip(
            self.part_M.tolist(), self.layer_M.tolist(), self.time_RM[rank].tolist(), strict=True
        ):
            of_layer = part in (Part.ATTENTION, Part.EXPERTS)
            if part != Part.EXCHANGE:
                label = Part(part).label
                name, facts = (f"{label} {layer}", {"layer": layer}) if of_layer else (label, {})
                yield Span(name, "compute", rank, before_ns, time_ns, facts)
            before_ns = time_ns

    def _exchange(self, rank: int, n: int) -> Iterator[Span]:
        begin_ns, end_ns = int(self.begin_Rn[rank, n]), int(self.end_Rn[rank, n])
        wait_ns = int(self.wait_Rn[rank, n])
        label = Kind(int(self.kind_n[n])).label
        facts = {
            "layer": int(self.layer_n[n]),
            "bytes": int(self.sent_Rn[rank, n]),
            "wait_us": wait_ns / 1000,
            "wire_us": (end_ns - begin_ns - wait_ns) / 1000,
        }
        yield Span(label, "exchange", rank, begin_ns, end_ns, facts)
        if wait_ns > 0:
            yield Span("wait", "wait", rank, begin_ns, begin_ns + wait_ns, {})


class Timeline:
    """The newest steps, as many as have room.

    Attributes:
        dropped_steps: Older ones that had none.
    """

    def __init__(self, most_spans: int = MOST_SPANS) -> None:
        """No step yet."""
        self._most_spans = most_spans
        self._spans = 0
        self._steps: deque[TimelineStep] = deque()
        self._count = 0
        self.dropped_steps = 0

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self._steps)

    @property
    def spans_at_most(self) -> int:
        """How many spans its steps have at most."""
        return self._spans

    @property
    def begin_ns(self) -> int:
        """When the first of them begins, on rank 0's clock; 0 if there is none."""
        return min((step.first_ns for step in self._steps), default=0)

    def spans(self) -> Iterator[Span]:
        """Of all steps that are left, step by step."""
        for step in self._steps:
            yield from step.spans()

    def add(self, split: SplitNotes, marks: Marks, before: ClockSample, after: ClockSample) -> None:
        """Take the steps of some notes.

        Args:
            split: The notes.
            marks: Of the same steps, times of all ranks [R, M], each on its own clock.
            before: The clocks at the beginning of the notes.
            after: And at their end.
        """
        time_RM = to_leaders_clock(marks.time_M, before, after)
        last = 0
        for s, stop in enumerate(split.notes.stop_S.tolist()):
            step = _cut(split, marks, time_RM, s, slice(last, stop), self._count)
            last = stop
            self._count += 1
            self._steps.append(step)
            self._spans += step.span_count
        while self._spans > self._most_spans and len(self._steps) > 1:
            self._spans -= self._steps.popleft().span_count
            self.dropped_steps += 1


def _cut(split: SplitNotes, marks: Marks, time_RM: Int64s, s: int, cut: slice, number: int) -> TimelineStep:
    notes = split.notes
    own = slice(int(marks.first_S[s]), int(marks.stop_S[s]))
    return TimelineStep(
        number=number,
        prompt_tokens=int(notes.prompt_S[s]),
        decoded_tokens=int(notes.decoded_S[s]),
        begin_R=notes.step_begin_S[:, s].copy(),
        end_R=notes.step_end_S[:, s].copy(),
        drawn_ns=int(notes.drawn_S[s]),
        kind_n=notes.kind_n[cut].copy(),
        layer_n=layer_of(notes.place_n[cut]),
        inside_n=split.step_n[cut] >= 0,
        begin_Rn=notes.begin_n[:, cut].copy(),
        end_Rn=notes.end_n[:, cut].copy(),
        wait_Rn=split.wait_Rn[:, cut].copy(),
        sent_Rn=notes.wire_n[:, cut] + notes.shared_n[:, cut],
        part_M=marks.part_M[own].copy(),
        layer_M=marks.layer_M[own].copy(),
        time_RM=time_RM[:, own].copy(),
    )
