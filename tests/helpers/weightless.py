"""A layer of experts without weights, for what is decided before any is read: a chunk's address is its number x 64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import ChunkFormat, ChunkHolders, ExpertsLayer, LayerSizes, MatrixFormat, WeightFormat, Workers
from dist_moe.parallel.plan import CHUNK_READ_COST_TOKENS as READ_COST

Int64s = npt.NDArray[np.int64]
CHUNK_BYTES = 64
Q4 = ChunkFormat(MatrixFormat(WeightFormat.Q4, 32), MatrixFormat(WeightFormat.Q4, 32))


def weightless_layer(
    experts: int,
    chunks: int,
    owned: Int64s | None = None,
    holders: ChunkHolders | None = None,
    experts_per_token: int = 1,
    formats: Sequence[ChunkFormat] = (Q4,),
) -> ExpertsLayer:
    """A layer whose router decides nothing.

    Args:
        experts: Of the layer.
        chunks: Of all experts together.
        owned: The chunks of this rank; None: they are dealt out in each step.
        holders: Which node holds which chunk; None: one node has all.
        experts_per_token: That a token picks.
        formats: Of the experts; one if they are all alike.
    """
    sizes = LayerSizes(
        model_dim=32,
        heads=1,
        kv_heads=1,
        head_dim=32,
        experts_per_token=experts_per_token,
        workers=Workers(node=0, rank=0, ranks=1, read_cost=READ_COST),
        norm_topk_prob=True,
        eps=np.float32(1e-6),
        score_scale=np.float32(1),
        kv_of_h=np.zeros(1, np.int32),
    )
    more = {} if holders is None else {"holders": holders}
    return ExpertsLayer(
        sizes,
        0,
        norm_D=np.ones(32, np.float32),
        router=None,
        addresses=np.arange(chunks, dtype=np.uint64) * CHUNK_BYTES,
        formats=formats,
        owned=owned,
        experts=experts,
        width=32,
        **more,
    )
