"""A text from begin to end, with the logits of every position or for who watches its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dist_moe.engine.leader import Leader
from dist_moe.engine.prefix_index import blocks_of
from dist_moe.engine.request import refuse_faults
from dist_moe.engine.worker import RowSink
from dist_moe.errors import Interrupted
from dist_moe.model.step import Slice, Step


def read_text(leader: Leader, ids: Sequence[int], sink: RowSink | None, interrupted: Callable[[], bool]) -> None:
    """Give the sink all rows in order, chunk by chunk, or compute no logits; see `Runtime.logits`."""
    sequence, chunk_tokens = leader.prefixes.new_sequences(), leader.options.prefill_chunk
    leader.prefixes.make_room(blocks_of(len(ids)))
    try:
        for first in range(0, len(ids), chunk_tokens):
            chunk = Slice(sequence, first, tuple(ids[first : first + chunk_tokens]))
            with leader.clock.step(len(chunk.ids), 0):
                result = leader.crew.run(_step(leader, chunk, sink is not None), sink)
            if interrupted():
                raise Interrupted(f"interrupted after {first + len(chunk.ids)} of {len(ids)} tokens")
            refuse_faults(result.fault_T, first, leader.config.layers)
        leader.crew.compare()
    finally:
        leader.prefixes.release(sequence)


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
