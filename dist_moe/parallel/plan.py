"""Which rank computes what: pure functions of the model's sizes and the rank count, without MPI.

Nothing here changes a bit of the result (sums over units are exact integers); it only decides who works.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.errors import UsageError
from dist_moe.split import VOCABULARY_BLOCK, contiguous, head_range_kv_heads, sliced_chunks, whole_chunks

EXPERT_LAYOUTS = ("whole", "sliced", "shared")

# Where each step's chunks are dealt out: reading one's weights costs as much as multiplying them with this many tokens.
CHUNK_READ_COST_TOKENS = 8


@dataclass(frozen=True)
class Plan:
    """One rank's share: contiguous query heads, their KV heads, vocabulary blocks, and a layout of experts."""

    rank: int
    ranks: int
    heads: range
    kv_heads: range
    vocabulary_blocks: range
    vocabulary_rows: range
    layout: str

    def owned_chunks(self, experts: int, chunks_per_expert: int) -> npt.NDArray[np.int64] | None:
        """The linear chunk indices that are always this rank's, ascending; None if each step deals them out anew."""
        if self.layout == "whole":
            return np.array(whole_chunks(experts, chunks_per_expert, self.ranks, self.rank), dtype=np.int64)
        if self.layout == "sliced":
            return np.array(sliced_chunks(experts, chunks_per_expert, self.ranks, self.rank), dtype=np.int64)
        return None


def make_plan(*, heads: int, heads_per_kv_head: int, vocabulary: int, rank: int, ranks: int, layout: str) -> Plan:
    """Cut a model's units over ranks.

    Args:
        heads: Query heads of the model.
        heads_per_kv_head: Query heads that share one KV head.
        vocabulary: Rows of lm_head, dealt out in blocks of 128.
        rank: Whose share.
        ranks: How many ranks there are; at most one per query head.
        layout: `whole`, `sliced` or `shared`.

    Raises:
        UsageError: There are more ranks than query heads.
    """
    if ranks > heads:
        raise UsageError(
            f"{ranks} ranks are more than the model's {heads} query heads, and each rank needs at least one: "
            f"start at most {heads} ranks (mpirun -n {heads}) and give each more --threads"
        )
    own_heads = contiguous(heads, ranks, rank)
    blocks = contiguous(-(-vocabulary // VOCABULARY_BLOCK), ranks, rank)
    first_row = min(blocks.start * VOCABULARY_BLOCK, vocabulary)
    return Plan(
        rank=rank,
        ranks=ranks,
        heads=own_heads,
        kv_heads=head_range_kv_heads(own_heads, heads_per_kv_head),
        vocabulary_blocks=blocks,
        vocabulary_rows=range(first_row, min(blocks.stop * VOCABULARY_BLOCK, vocabulary)),
        layout=layout,
    )
