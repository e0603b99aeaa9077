"""What a placement makes of recorded or assumed routing: the work of each node, by the rule that runs decide by.

Shape suffixes: S sampled tokens, K experts per token, E experts, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import ChunkHolders, WorkModel
from dist_moe.parallel.expert_plan import chunk_runs
from dist_moe.parallel.holdings import Held
from dist_moe.parallel.plan import CHUNK_READ_COST_TOKENS

Sets = npt.NDArray[np.integer]


class Simulation:
    """Steps of one layer, grouped once and judged under many placements."""

    def __init__(self, sets_SK: Sets, experts: int, chunks_per_expert: int, speeds: Sequence[int], batch: int) -> None:
        """Group tokens into steps of `batch`; a last step that is not full is left out, if there is another.

        Args:
            sets_SK: Which experts each token picks.
            experts: E.
            chunks_per_expert: Of the layer.
            speeds: Of the nodes.
            batch: Tokens of a step.
        """
        steps = max(1, len(sets_SK) // batch)
        used = sets_SK[: steps * batch].astype(np.int64)
        step_of = np.repeat(np.arange(len(used)) // batch, used.shape[1])
        counts = np.bincount(step_of * experts + used.ravel(), minlength=steps * experts).reshape(steps, experts)
        self._offset_SE1 = np.zeros((steps, experts + 1), np.int32)
        np.cumsum(counts, axis=1, out=self._offset_SE1[:, 1:])
        self._experts, self._chunks, self._speeds = experts, chunks_per_expert, tuple(speeds)

    def straggling(self, held_NC: Held) -> float:
        """Mean over steps of the busiest node's time with experts over the mean of all; 1 is best.

        Args:
            held_NC: Which node holds which chunk.
        """
        runs = chunk_runs(held_NC, self._experts)
        holders = ChunkHolders(runs.runs_R5, runs.node_H, len(self._speeds))
        model = WorkModel(holders, self._experts, self._chunks, self._speeds, CHUNK_READ_COST_TOKENS)
        return straggling(model.node_work(self._offset_SE1), self._speeds)

    def straggling_of_experts(self, held_NE: Held) -> float:
        """The same for whole experts."""
        return self.straggling(np.repeat(held_NE, self._chunks, axis=1))


def straggling(work_SN: npt.NDArray[np.int64], speeds: Sequence[int]) -> float:
    """Mean over steps of the longest time over the fair share of all work; steps without work do not count.

    Args:
        work_SN: Of each node in each step.
        speeds: Work that each node does in the same time.
    """
    worked = work_SN[work_SN.sum(axis=1) > 0]
    if not len(worked):
        return 1.0
    longest_S = (worked / np.array(speeds)).max(axis=1)
    return float((longest_S * sum(speeds) / worked.sum(axis=1)).mean())
