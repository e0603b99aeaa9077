"""The best tokens of each logit row travel to rank 0, not whole rows of logits (NUMERICS rule 13).

Shape suffixes: N logit rows, v local vocabulary rows, B vocabulary blocks (b local), C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import NO_FAULT, Kernels
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.plan import JobPlan, in_order
from dist_moe.split import VOCABULARY_BLOCK

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

CANDIDATES = 256


@dataclass(frozen=True)
class Candidates:
    """The best tokens of one row, best first, and every block's maximum and sum of exponentials.

    `complete`: no other token may be drawn. `unit_sum_B` has the sums at temperature 1, where they were asked for.
    """

    ids_C: npt.NDArray[np.int32]
    logits_C: Floats
    max_B: Floats
    sum_B: Floats
    complete: bool
    unit_sum_B: Floats | None = None


@dataclass(frozen=True)
class _Sections:
    """N rows of a message: ids, logits, and the blocks' maxima, sums and, if asked for, sums at temperature 1."""

    ids_NC: Ids
    logits_NC: Floats
    values_Nb: list[Floats]


@dataclass(frozen=True)
class _Layout:
    """The memory of messages of N rows. `key`: rows, sums at temperature 1, valid vocabulary; `valid` own columns.

    On rank 0 `merged` has what the ranks' `parts` of `gathered` become: with one rank, its own message.
    """

    key: tuple[int, bool, int]
    valid: int
    temperature_N: Floats
    message: Ids
    own: _Sections
    gathered: Ids | None
    parts: list[_Sections]
    merged: _Sections
    candidates: list[Candidates]


class CandidateExchange:
    """Turns each rank's logits into candidates on rank 0."""

    def __init__(self, exchange: Exchange, kernels: Kernels, job: JobPlan, rank: int) -> None:
        """Note who has which part of the message.

        Args:
            exchange: The collectives.
            kernels: An ISA level with its threads.
            job: Which rank has which blocks of lm_head.
            rank: This one.
        """
        self._exchange = exchange
        self._kernels = kernels
        self._rank = rank
        self._vocabulary = sum(plan.vocabulary_rows for plan in job.plans)
        self._own = np.array(job.plans[rank].vocabulary_blocks, np.int32)
        self._block_counts = [len(plan.vocabulary_blocks) for plan in job.plans]
        self._place_B = in_order(block for plan in job.plans for block in plan.vocabulary_blocks)
        self._count = min(CANDIDATES, self._vocabulary)
        self._layout = self._lay_out(0, False, 0)

    def gather(
        self,
        logits_Nv: Floats,
        temperatures: Sequence[float],
        valid_vocabulary: int,
        fault_N: npt.NDArray[np.int32],
        layer: int,
        unit_sums: bool = False,
    ) -> list[Candidates] | None:
        """Send this rank's candidates to rank 0.

        Args:
            logits_Nv: This rank's logits of every row.
            temperatures: One per row.
            valid_vocabulary: Ids from here on are masked.
            fault_N: Gets the faults found in the logits.
            layer: What to name such a fault's layer.
            unit_sums: Send the sums at temperature 1, too.

        Returns:
            One entry per row on rank 0, valid until the next call; None elsewhere.
        """
        if self._layout.key != (len(logits_Nv), unit_sums, valid_vocabulary):
            self._layout = self._lay_out(len(logits_Nv), unit_sums, valid_vocabulary)
        layout, own = self._layout, self._layout.own
        if len(self._own):
            kernels, valid, temperature_N = self._kernels, layout.valid, layout.temperature_N
            max_Nb, sum_Nb, *unit_sum = own.values_Nb
            temperature_N[:] = temperatures
            kernels.vocabulary_blocks(max_Nb, sum_Nb, fault_N, logits_Nv, temperature_N, valid, layer)
            for unit_sum_Nb in unit_sum:
                temperature_N.fill(1)
                kernels.vocabulary_blocks(max_Nb, unit_sum_Nb, fault_N, logits_Nv, temperature_N, valid, layer)
            kernels.top_logits(own.ids_NC, own.logits_NC, logits_Nv, max_Nb, self._own, valid)
        if self._exchange.gather_equal(layout.message, layout.gathered) is None:
            return None
        if len(layout.parts) > 1:
            self._merge(layout.parts, layout.merged)
        return layout.candidates

    def _lay_out(self, N: int, unit_sums: bool, valid_vocabulary: int) -> _Layout:
        W, C, kinds = len(self._block_counts), self._count, 2 + unit_sums
        length = N * (2 * C + kinds * max(self._block_counts))
        message = np.zeros(length, np.int32)
        own = self._sections(message, N, kinds, len(self._own))
        own.ids_NC.fill(-1)  # stays where a rank has no blocks
        gathered = np.empty((W, length), np.int32) if W > 1 and self._rank == 0 else None
        parts, merged = [own], own
        if gathered is not None:
            messages = zip(gathered, self._block_counts, strict=True)
            parts = [self._sections(part, N, kinds, blocks) for part, blocks in messages]
            values_NB = [np.empty((N, len(self._place_B)), np.float32) for _ in range(kinds)]
            merged = _Sections(np.empty((N, W * C), np.int32), np.empty((N, W * C), np.float32), values_NB)
        # Only the best C are certain: a rank's next one, not sent, may beat what follows them.
        allowed = max(0, min(valid_vocabulary, self._vocabulary))
        return _Layout(
            key=(N, unit_sums, valid_vocabulary),
            # This rank's columns ascend by id.
            valid=int(np.clip(valid_vocabulary - self._own * VOCABULARY_BLOCK, 0, VOCABULARY_BLOCK).sum()),
            temperature_N=np.empty(N, np.float32),
            message=message,
            own=own,
            gathered=gathered,
            parts=parts,
            merged=merged,
            candidates=[_candidates(merged, row, min(C, allowed), allowed <= C) for row in range(N)],
        )

    def _sections(self, message: Ids, N: int, kinds: int, blocks: int) -> _Sections:
        C, B, floats = self._count, max(self._block_counts), message.view(np.float32)
        values = floats[2 * N * C :].reshape(kinds, N * B)[:, : N * blocks].reshape(kinds, N, blocks)
        return _Sections(message[: N * C].reshape(N, C), floats[N * C : 2 * N * C].reshape(N, C), list(values))

    def _merge(self, parts: Sequence[_Sections], merged: _Sections) -> None:
        np.concatenate([part.ids_NC for part in parts], axis=1, out=merged.ids_NC)
        np.concatenate([part.logits_NC for part in parts], axis=1, out=merged.logits_NC)
        self._kernels.merge_candidates(merged.ids_NC, merged.logits_NC, self._count)
        for kind, values_NB in enumerate(merged.values_Nb):
            side_by_side = np.concatenate([part.values_Nb[kind] for part in parts], axis=1)
            np.take(side_by_side, self._place_B, axis=1, out=values_NB)


def _candidates(whole: _Sections, row: int, count: int, complete: bool) -> Candidates:
    values = [values_NB[row] for values_NB in whole.values_Nb]
    return Candidates(
        ids_C=whole.ids_NC[row, :count],
        logits_C=whole.logits_NC[row, :count],
        max_B=values[0],
        sum_B=values[1],
        complete=complete,
        unit_sum_B=values[2] if len(values) > 2 else None,
    )


def block_sums(
    kernels: Kernels,
    logits_Nv: Floats,
    temperatures: Sequence[float],
    valid: int,
    fault_N: npt.NDArray[np.int32],
    layer: int,
) -> tuple[Floats, Floats]:
    """Maximum and sum of exponentials of each row's blocks, f32 [N, b] each; notes faults in the logits."""
    N, v = logits_Nv.shape
    blocks = -(-v // VOCABULARY_BLOCK)
    max_Nb, sum_Nb = np.empty((N, blocks), dtype=np.float32), np.empty((N, blocks), dtype=np.float32)
    temperature_N = np.array(temperatures, dtype=np.float32)
    kernels.vocabulary_blocks(max_Nb, sum_Nb, fault_N, logits_Nv, temperature_N, min(valid, v), layer)
    return max_Nb, sum_Nb


def row_candidates(
    kernels: Kernels, logits_V: Floats, temperature: float, valid_vocabulary: int, count: int
) -> Candidates:
    """The candidates of one whole row of logits on rank 0."""
    valid = max(0, min(valid_vocabulary, len(logits_V)))
    fault_N, logits_NV = np.full(1, NO_FAULT, dtype=np.int32), logits_V[None]
    max_NB, sum_NB = block_sums(kernels, logits_NV, [temperature], valid, fault_N, 0)
    ids_NC, logits_NC = np.empty((1, count), dtype=np.int32), np.empty((1, count), dtype=np.float32)
    kernels.top_logits(ids_NC, logits_NC, logits_NV, max_NB, np.arange(max_NB.shape[1], dtype=np.int32), valid)
    found = min(count, valid)
    return _candidates(_Sections(ids_NC, logits_NC, [max_NB, sum_NB]), 0, found, found == valid)
