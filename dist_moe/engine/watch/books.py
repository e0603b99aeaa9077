"""Brings the ranks' notes together now and then: rank 0 keeps accounts of them and, while one is made, a timeline."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dist_moe.engine.watch.accounts import Accounts, split_notes
from dist_moe.engine.watch.timeline import Timeline
from dist_moe.model.stopwatch import MarkLog, Stopwatch
from dist_moe.parallel.clocks import sample_clocks
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.ledger import Notes

Int64s = npt.NDArray[np.int64]

# Fields of the notes that differ between ranks and travel to rank 0.
_OWN = ("begin_n", "end_n", "wire_n", "shared_n", "step_begin_S", "step_end_S", "work_SL2")


@dataclass(frozen=True)
class _Message:
    """One rank's notes as one run of words, as long on every rank."""

    words: Int64s
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, notes: Notes, mark_M: Int64s) -> _Message:
        arrays = [*(getattr(notes, name) for name in _OWN), mark_M]
        return cls(np.concatenate([array.ravel() for array in arrays]), tuple(array.shape for array in arrays))

    def unpack(self, words_Rw: Int64s) -> list[Int64s]:
        """The arrays of all ranks, each with a first axis R."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
        parts = np.split(words_Rw, ends[:-1], axis=1)
        return [part.reshape(len(words_Rw), *shape) for part, shape in zip(parts, self.shapes, strict=True)]


class Books:
    """One rank's side. `settle` is collective, and so are its turns: all ranks' notes fill up alike.

    Attributes:
        accounts: On rank 0, since the start, up to the last `settle`.
        timeline: On rank 0, while one is made.
    """

    def __init__(self, exchange: Exchange, stopwatch: Stopwatch, work_L2: Int64s, speeds: tuple[int, ...]) -> None:
        """Open the books; collective.

        Args:
            exchange: Whose ledger has the notes.
            stopwatch: Marks the parts of steps while a timeline is made.
            work_L2: What this rank computed in each layer of the last step; see `Notes`.
            speeds: Of the nodes.
        """
        world = exchange.world
        self._exchange, self._stopwatch, self._work_L2 = exchange, stopwatch, work_L2
        self._ledger = exchange.ledger
        self._ledger.take()  # the start's
        self._ledger.expect_layers(len(work_L2))
        self.accounts = Accounts(world.size, len(work_L2), world.node_of_rank, speeds)
        self.timeline: Timeline | None = None
        self._clocks = sample_clocks(world)

    def begin_step(self, tokens: int, sequences: int) -> None:
        """A step begins."""
        self._ledger.begin_step(tokens, sequences)
        if self._stopwatch.log is not None:
            self._stopwatch.log.begin_step()

    def end_step(self) -> None:
        """A step is done on all ranks; settles when notes have filled up."""
        self._ledger.end_step(self._work_L2)
        log = self._stopwatch.log
        if log is not None:
            log.end_step()
        if self._ledger.is_full or (log is not None and log.is_full):
            self.settle()

    def settle(self) -> None:
        """Bring the notes of all ranks to rank 0, which adds them up; collective."""
        notes = self._ledger.take()
        log = self._stopwatch.log
        marks = log.take() if log is not None else None
        message = _Message.of(notes, np.empty(0, np.int64) if marks is None else marks.time_M)
        words_Rw = self._exchange.gather_equal(message.words)
        before, self._clocks = self._clocks, sample_clocks(self._exchange.world)
        if words_Rw is None:
            return
        *own, mark_RM = message.unpack(words_Rw)
        notes = notes.of_all_ranks(dict(zip(_OWN, own, strict=True)))
        split = split_notes(notes, before, self._clocks)
        self.accounts.add(split, self._clocks.error_ns)
        if self.timeline is not None and marks is not None:
            self.timeline.add(split, replace(marks, time_M=mark_RM), before, self._clocks)

    def mark_steps(self, on: bool) -> None:
        """Mark the parts of steps from now on, or no longer; collective, between steps."""
        self.settle()
        self._stopwatch.log = MarkLog(self._exchange.world.progress) if on else None
