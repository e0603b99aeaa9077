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
from dist_moe.split import VOCABULARY_BLOCK, contiguous

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

    def __init__(self, exchange: Exchange, kernels: Kernels, vocabulary: int, ranks: int, rank: int) -> None:
        """Lay out the message.

        Args:
            exchange: The collectives.
            kernels: An ISA level with its threads.
            vocabulary: V, the rows of lm_head over all ranks.
            ranks: How many ranks there are.
            rank: This one.
        """
        self._exchange = exchange
        self._kernels = kernels
        self._vocabulary = vocabulary
        blocks = -(-vocabulary // VOCABULARY_BLOCK)
        self._blocks = [contiguous(blocks, ranks, r) for r in range(ranks)]
        self._own = self._blocks[rank]
        self._max_blocks = len(self._blocks[0])
        self._count = min(CANDIDATES, vocabulary)

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
        if self._own:
            first_id = self._own.start * VOCABULARY_BLOCK
            part = local_candidates(
                self._kernels, logits_Nv, temperatures, valid_vocabulary - first_id, first_id, C, fault_N, layer
            )
            b = len(self._own)
            message[:, :C] = part.ids_NC
            message[:, C : 2 * C] = part.logits_NC.view(np.int32)
            message[:, 2 * C : 2 * C + b] = part.max_Nb.view(np.int32)
            message[:, 2 * C + B : 2 * C + B + b] = part.sum_Nb.view(np.int32)
            if unit_sums:
                ones, valid = (1.0,) * N, max(0, valid_vocabulary - first_id)
                _, unit_sum_Nb = block_sums(self._kernels, logits_Nv, ones, valid, fault_N, layer)
                message[:, 2 * C + 2 * B : 2 * C + 2 * B + b] = unit_sum_Nb.view(np.int32)
        else:
            message[:, :C] = -1
        gathered = self._exchange.gather_equal(message)
        if gathered is None:
            return None
        return [self._merge(gathered[:, row], valid_vocabulary) for row in range(N)]

    def _merge(self, words: npt.NDArray[np.int32], valid_vocabulary: int) -> Candidates:
        C, B = self._count, self._max_blocks
        ids, logits = words[:, :C].ravel(), words[:, C : 2 * C].ravel().view(np.float32)
        present = ids >= 0
        ids, logits = np.ascontiguousarray(ids[present]), np.ascontiguousarray(logits[present])
        self._kernels.merge_candidates(ids, logits)
        # Behind the candidates: maxima, sums, and sums at temperature 1 if there are any.
        parts = [
            np.concatenate([words[r, at : at + len(own)] for r, own in enumerate(self._blocks)]).view(np.float32)
            for at in range(2 * C, words.shape[1], B)
        ]
        # Only the best C are certain: a rank's next one, not sent, may beat what follows them.
        return Candidates(
            ids_C=ids[:C],
            logits_C=logits[:C],
            max_B=parts[0],
            sum_B=parts[1],
            complete=min(valid_vocabulary, self._vocabulary) <= C,
            unit_sum_B=parts[2] if len(parts) > 2 else None,
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
    first_id: int,
    count: int,
    fault_N: npt.NDArray[np.int32],
    layer: int,
) -> LocalCandidates:
    """The best `count` of each row's logits and the sums of its blocks; columns from `valid` on are masked."""
    N, v = logits_Nv.shape
    valid = max(0, min(valid, v))
    max_Nb, sum_Nb = block_sums(kernels, logits_Nv, temperatures, valid, fault_N, layer)
    ids_NC, logits_NC = np.empty((N, count), dtype=np.int32), np.empty((N, count), dtype=np.float32)
    kernels.top_logits(ids_NC, logits_NC, logits_Nv, valid, first_id)
    return LocalCandidates(ids_NC, logits_NC, max_Nb, sum_Nb)


def row_candidates(
    kernels: Kernels, logits_V: Floats, temperature: float, valid_vocabulary: int, count: int
) -> Candidates:
    """The candidates of one whole row of logits on rank 0."""
    fault_N = np.full(1, NO_FAULT, dtype=np.int32)
    part = local_candidates(kernels, logits_V[None], [temperature], valid_vocabulary, 0, count, fault_N, 0)
    valid = min(valid_vocabulary, len(logits_V))
    found = min(count, valid)
    return Candidates(
        ids_C=part.ids_NC[0, :found],
        logits_C=part.logits_NC[0, :found],
        max_B=part.max_Nb[0],
        sum_B=part.sum_Nb[0],
        complete=found == valid,
    )
