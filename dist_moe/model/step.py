"""A step: what rank 0 asks of all ranks at once, and how it travels (one array of int64 words)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Rows of logits that one step may ask for: they are computed together and kept until the next step.
MAX_LOGIT_ROWS = 16

# Words of a packed step before its lists.
COUNTS = 9


@dataclass(frozen=True)
class Slice:
    """Consecutive tokens of one sequence.

    `sequence` names the KV cache that they join; `position` is the first token's.
    """

    sequence: int
    position: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Fork:
    """A new sequence that begins with the first `positions` positions (at least one) of what `source` holds."""

    sequence: int
    source: int
    positions: int


@dataclass(frozen=True)
class Step:
    """A batch of slices of different sequences, prefill chunks and decodes alike.

    Attributes:
        slices: At most one per sequence.
        logit_rows: Tokens of the flattened batch whose logits are needed, ascending.
        temperatures: One f32 value per logit row (NUMERICS rule 13 sums at the request's temperature); empty if no
            token is to be drawn.
        full_logits: Gather whole rows of logits on rank 0, too.
        valid_vocabulary: Ids from here on are masked in sampling.
        released: Sequences whose KV cache is freed before the step, after the forks.
        forks: Made before anything else, in this order.
        unit_sums: Sum every row at temperature 1, too, for log-probabilities.
        partitioned: Each token's residual is kept by one rank alone, its owner, and tokens travel to their experts;
            else every rank has all residuals, and sums are exchanged (`model.token_parallel`). The result is the same.
    """

    slices: tuple[Slice, ...]
    logit_rows: tuple[int, ...]
    temperatures: tuple[float, ...]
    full_logits: bool
    valid_vocabulary: int
    released: tuple[int, ...] = ()
    forks: tuple[Fork, ...] = ()
    unit_sums: bool = False
    partitioned: bool = False

    @property
    def tokens(self) -> int:
        """T, the tokens of all slices."""
        return sum(len(part.ids) for part in self.slices)

    def flat_ids(self) -> npt.NDArray[np.int32]:
        """The ids of all slices in order, int32 [T]."""
        return np.array([token for part in self.slices for token in part.ids], dtype=np.int32)

    def pack(self) -> npt.NDArray[np.int64]:
        """The step as words: counts, slices, ids, logit rows, temperatures (as f32 bits), released sequences, forks."""
        temperatures = np.array(self.temperatures, dtype=np.float32).view(np.uint32)
        words: list[int] = [
            len(self.slices),
            len(self.logit_rows),
            len(self.temperatures),
            int(self.full_logits),
            self.valid_vocabulary,
            len(self.released),
            len(self.forks),
            int(self.unit_sums),
            int(self.partitioned),
        ]
        for part in self.slices:
            words += (part.sequence, part.position, len(part.ids))
        for part in self.slices:
            words += part.ids
        words += self.logit_rows
        words += temperatures.tolist()
        words += self.released
        for fork in self.forks:
            words += (fork.sequence, fork.source, fork.positions)
        return np.array(words, dtype=np.int64)

    @staticmethod
    def unpack(words: npt.NDArray[np.int64]) -> Step:
        """The inverse of `pack`."""
        values = words.tolist()
        slice_count, row_count, temperature_count, full_logits, valid_vocabulary = values[:5]
        released_count, fork_count, unit_sums, partitioned = values[5:COUNTS]
        heads = [values[COUNTS + 3 * i : COUNTS + 3 * (i + 1)] for i in range(slice_count)]
        at = COUNTS + 3 * slice_count
        slices = []
        for sequence, position, count in heads:
            slices.append(Slice(sequence, position, tuple(values[at : at + count])))
            at += count
        rows = tuple(values[at : at + row_count])
        at += row_count
        bits = np.array(values[at : at + temperature_count], dtype=np.uint32)
        at += temperature_count
        first_fork = at + released_count
        return Step(
            slices=tuple(slices),
            logit_rows=rows,
            temperatures=tuple(bits.view(np.float32).tolist()),
            full_logits=bool(full_logits),
            valid_vocabulary=valid_vocabulary,
            released=tuple(values[at:first_fork]),
            forks=tuple(Fork(*values[first_fork + 3 * i : first_fork + 3 * (i + 1)]) for i in range(fork_count)),
            unit_sums=bool(unit_sums),
            partitioned=bool(partitioned),
        )
