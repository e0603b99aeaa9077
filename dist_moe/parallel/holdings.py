"""Which node's files hold which units: what a plan is made from. Pure.

Shape suffixes: N nodes, H query heads, G KV heads, B vocabulary blocks, C chunks of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.model_config import ModelConfig, chunk_width, round_up
from dist_moe.split import VOCABULARY_BLOCK

Held = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Holdings:
    """What every node has in its files; layers of one kind that are held alike may share one array.

    Attributes:
        heads_NH: Query heads, the same in every layer.
        kv_heads_NG: KV heads, likewise.
        vocabulary_NB: Blocks of lm_head's rows.
        chunks_NC: Per layer, its expert chunks (a dense MLP is one expert).
    """

    heads_NH: Held
    kv_heads_NG: Held
    vocabulary_NB: Held
    chunks_NC: tuple[Held, ...]

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return len(self.heads_NH)

    @property
    def every_chunk_everywhere(self) -> bool:
        """Whether each node has every chunk."""
        return all(bool(held_NC.all()) for held_NC in self.chunks_NC)


def chunk_counts(config: ModelConfig, group_size: int, layer: int) -> tuple[int, int]:
    """Experts of a layer and the chunks of each (NUMERICS rule 8)."""
    hidden = config.layer_hidden(layer)
    return config.layer_experts(layer), round_up(hidden, 32) // chunk_width(hidden, group_size)


def everything_held(config: ModelConfig, group_size: int, nodes: int) -> Holdings:
    """Each node has all units of the model."""

    def held(units: int) -> Held:
        return np.ones((nodes, units), np.bool_)

    counts = [chunk_counts(config, group_size, layer) for layer in range(config.layers)]
    of_kind = {kind: held(kind[0] * kind[1]) for kind in set(counts)}
    return Holdings(
        heads_NH=held(config.heads),
        kv_heads_NG=held(config.kv_heads),
        vocabulary_NB=held(-(-config.vocabulary // VOCABULARY_BLOCK)),
        chunks_NC=tuple(of_kind[kind] for kind in counts),
    )
