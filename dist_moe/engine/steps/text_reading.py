"""A text from begin to end, with the logits of every position or for who watches its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dist_moe.engine.requests.prefix_index import blocks_of
from dist_moe.engine.requests.request import refuse_faults
from dist_moe.engine.steps.leader import Leader
from dist_moe.engine.steps.worker import Floats, RowSink
from dist_moe.errors import DistMoeError, Interrupted
from dist_moe.model.step import Slice, Step


def read_text(leader: Leader, ids: Sequence[int], sink: RowSink | None, interrupted: Callable[[], bool]) -> None:
    """Give the sink all rows in order, chunk by chunk, or compute no logits; see `Runtime.logits`."""
    held_back = None if sink is None else _HeldBack(sink)
    sequence, chunk_tokens = leader.prefixes.new_sequences(), leader.options.prefill_chunk
    leader.prefixes.make_room(blocks_of(len(ids)))
    try:
        for first in range(0, len(ids), chunk_tokens):
            chunk = Slice(sequence, first, tuple(ids[first : first + chunk_tokens]))
            with leader.clock.step(len(chunk.ids), 0):
                result = leader.crew.run(_step(leader, chunk, sink is not None), held_back)
            if held_back is not None and held_back.error is not None:
                raise held_back.error
            if interrupted():
                raise Interrupted(f"interrupted after {first + len(chunk.ids)} of {len(ids)} tokens")
            refuse_faults(result.fault_T, first, leader.config.layers)
        leader.crew.compare()
    finally:
        leader.prefixes.release(sequence)


class _HeldBack:
    """A sink inside a step, in which the other ranks wait: what it refuses is kept until all have left the step."""

    def __init__(self, sink: RowSink) -> None:
        self._sink = sink
        self.error: DistMoeError | None = None

    def __call__(self, rows_NV: Floats) -> None:
        if self.error is None:
            try:
                self._sink(rows_NV)
            except DistMoeError as error:
                self.error = error


def _step(leader: Leader, chunk: Slice, logits: bool) -> Step:
    forks, released = leader.prefixes.take_orders()
    return Step(
        slices=(chunk,),
        logit_rows=tuple(range(len(chunk.ids))) if logits else (),
        temperatures=(),
        full_logits=logits,
        valid_vocabulary=leader.config.vocabulary,
        released=released,
        forks=forks,
    )
