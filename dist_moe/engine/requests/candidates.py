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


class CandidateExchange:
    """Turns each rank's logits into candidates on rank 0."""

    def __init__(self, exchange: Exchange, kernels: Kernels, job: JobPlan, rank: int) -> None:
        """Lay out the message.

        Args:
            exchange: The collectives.
            kernels: An ISA level with its threads.
            job: Which rank has which blocks of lm_head.
            rank: This one.
        """
        self._exchange = exchange
        self._kernels = kernels
        self._vocabulary = sum(plan.vocabulary_rows for plan in job.plans)
        self._own = np.array(job.plans[rank].vocabulary_blocks, np.int32)
        self._block_counts = [len(plan.vocabulary_blocks) for plan in job.plans]
        self._max_blocks = max(self._block_counts)
        self._place_B = in_order(block for plan in job.plans for block in plan.vocabulary_blocks)
        self._count = min(CANDIDATES, self._vocabulary)

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
            One entry per row on rank 0, None elsewhere.
        """
        N, C, B = len(logits_Nv), self._count, self._max_blocks
        message = np.zeros((N, 2 * C + (2 + unit_sums) * B), dtype=np.int32)
        b = len(self._own)
        if b:
            valid = self._valid_columns(valid_vocabulary)
            part = local_candidates(self._kernels, logits_Nv, temperatures, valid, C, fault_N, layer)
            message[:, :C] = self._ids_of(part.ids_NC)
            message[:, C : 2 * C] = part.logits_NC.view(np.int32)
            message[:, 2 * C : 2 * C + b] = part.max_Nb.view(np.int32)
            message[:, 2 * C + B : 2 * C + B + b] = part.sum_Nb.view(np.int32)
            if unit_sums:
                _, unit_sum_Nb = block_sums(self._kernels, logits_Nv, (1.0,) * N, valid, fault_N, layer)
                message[:, 2 * C + 2 * B : 2 * C + 2 * B + b] = unit_sum_Nb.view(np.int32)
        else:
            message[:, :C] = -1
        gathered = self._exchange.gather_equal(message)
        if gathered is None:
            return None
        return [self._merge(gathered[:, row], valid_vocabulary) for row in range(N)]

    def _valid_columns(self, valid_vocabulary: int) -> int:
        """How many of this rank's columns, which ascend by id, stand for ids below `valid_vocabulary`."""
        return int(np.clip(valid_vocabulary - self._own * VOCABULARY_BLOCK, 0, VOCABULARY_BLOCK).sum())

    def _ids_of(self, column_NC: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The ids of this rank's columns; -1 stays."""
        block_NC, row_NC = np.divmod(column_NC, VOCABULARY_BLOCK)
        ids: npt.NDArray[np.int32] = np.where(column_NC < 0, -1, self._own[block_NC] * VOCABULARY_BLOCK + row_NC)
        return ids

    def _merge(self, words: npt.NDArray[np.int32], valid_vocabulary: int) -> Candidates:
        C, B = self._count, self._max_blocks
        ids, logits = words[:, :C].ravel(), words[:, C : 2 * C].ravel().view(np.float32)
        present = ids >= 0
        ids, logits = np.ascontiguousarray(ids[present]), np.ascontiguousarray(logits[present])
        self._kernels.merge_candidates(ids, logits)
        # Behind the candidates: maxima, sums, and sums at temperature 1 if there are any.
        parts = [
            np.concatenate([words[r, at : at + b] for r, b in enumerate(self._block_counts)])[self._place_B]
            for at in range(2 * C, words.shape[1], B)
        ]
        # Only the best C are certain: a rank's next one, not sent, may beat what follows them.
        return Candidates(
            ids_C=ids[:C],
            logits_C=logits[:C],
            max_B=parts[0].view(np.float32),
            sum_B=parts[1].view(np.float32),
            complete=min(valid_vocabulary, self._vocabulary) <= C,
            unit_sum_B=parts[2].view(np.float32) if len(parts) > 2 else None,
        )


@dataclass(frozen=True)
class LocalCandidates:
    """The candidates and block sums of one rank's logits."""

    ids_NC: npt.NDArray[np.int32]
    logits_NC: Floats
    max_Nb: Floats
    sum_Nb: Floats


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


def local_candidates(
    kernels: Kernels,
    logits_Nv: Floats,
    temperatures: Sequence[float],
    valid: int,
    count: int,
    fault_N: npt.NDArray[np.int32],
    layer: int,
) -> LocalCandidates:
    """The best `count` columns of each row's logits, the sums of its blocks; those from `valid` on are masked."""
    N, v = logits_Nv.shape
    valid = max(0, min(valid, v))
    max_Nb, sum_Nb = block_sums(kernels, logits_Nv, temperatures, valid, fault_N, layer)
    ids_NC, logits_NC = np.empty((N, count), dtype=np.int32), np.empty((N, count), dtype=np.float32)
    kernels.top_logits(ids_NC, logits_NC, logits_Nv, valid, 0)
    return LocalCandidates(ids_NC, logits_NC, max_Nb, sum_Nb)


def row_candidates(
    kernels: Kernels, logits_V: Floats, temperature: float, valid_vocabulary: int, count: int
) -> Candidates:
    """The candidates of one whole row of logits on rank 0."""
    fault_N = np.full(1, NO_FAULT, dtype=np.int32)
    part = local_candidates(kernels, logits_V[None], [temperature], valid_vocabulary, count, fault_N, 0)
    valid = min(valid_vocabulary, len(logits_V))
    found = min(count, valid)
    return Candidates(
        ids_C=part.ids_NC[0, :found],
        logits_C=part.logits_NC[0, :found],
        max_B=part.max_Nb[0],
        sum_B=part.sum_Nb[0],
        complete=found == valid,
    )
