"""K and V of a sequence between all ranks and rank 0, layer by layer; a KV head that several ranks hold travels once.

n positions · G KV heads · g KV heads of one rank · B bytes of a position of one KV head
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import BLOCK_POSITIONS
from dist_moe.model.transformer import Transformer
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.plan import Plan, make_plan

Rows = npt.NDArray[np.uint8]
RowsSink = Callable[[Rows], None]  # told uint8 [n, G, B] for the next n positions of a layer, layer after layer
RowsSource = Callable[[int, int, int], Rows]  # from a layer and its positions [first, stop) to uint8 [n, G, B]

PIECE_POSITIONS = 16 * BLOCK_POSITIONS


class KvTransfer:
    """One rank's part. Every method is collective: all ranks call it alike."""

    def __init__(self, model: Transformer, exchange: Exchange, ranks: int) -> None:
        """Find out who sends which KV heads.

        Args:
            model: This rank's part of the model.
            exchange: The collectives.
            ranks: How many ranks there are.
        """
        self._model, self._exchange = model, exchange
        plans = [_plan_of(model, rank, ranks) for rank in range(ranks)]
        self._kv_heads = plans[model.share.plan.rank].kv_heads
        sent = [range(0), *(plan.kv_heads for plan in plans)]
        self._sent = [range(max(own.start, before.stop), own.stop) for before, own in pairwise(sent)]

    def gather(self, sequence: int, positions: int, sink: RowsSink | None) -> None:
        """Show rank 0 the first positions of a sequence.

        Args:
            sequence: Whose; it holds at least `positions`.
            positions: How many.
            sink: On rank 0, must not raise: the other ranks wait for all of it to be fetched.
        """
        model, cache = self._model, self._model.cache
        own = self._sent[model.share.plan.rank]
        columns = slice(own.start - self._kv_heads.start, own.stop - self._kv_heads.start)
        words = cache.row_bytes // 4
        counts = [len(heads) * words for heads in self._sent]
        out = np.empty((PIECE_POSITIONS, sum(counts)), np.float32) if sink is not None else None
        for layer, first, stop in self._pieces(positions):
            rows = np.ascontiguousarray(cache.read(sequence, layer, first, stop)[:, columns])
            local = rows.reshape(stop - first, -1).view(np.float32)  # bits: nothing computes with them
            found = self._exchange.gather_columns(local, counts, None if out is None else out[: stop - first])
            if sink is not None and found is not None:
                sink(found.view(np.uint8).reshape(stop - first, -1, cache.row_bytes))

    def scatter(self, sequence: int, positions: int, source: RowsSource | None) -> None:
        """Give a new sequence the positions that rank 0 has.

        Args:
            sequence: Its name.
            positions: How many.
            source: On rank 0, must not raise.
        """
        cache, kv_heads = self._model.cache, self._kv_heads
        whole = np.empty((PIECE_POSITIONS, self._model.config.kv_heads, cache.row_bytes), np.uint8)
        for layer, first, stop in self._pieces(positions):
            rows = whole[: stop - first]
            if source is not None:
                rows[:] = source(layer, first, stop)
            self._exchange.broadcast(rows)
            cache.write(sequence, layer, first, rows[:, kv_heads.start : kv_heads.stop])

    def _pieces(self, positions: int) -> Iterator[tuple[int, int, int]]:
        for layer in range(self._model.config.layers):
            for first in range(0, positions, PIECE_POSITIONS):
                yield layer, first, min(first + PIECE_POSITIONS, positions)


def _plan_of(model: Transformer, rank: int, ranks: int) -> Plan:
    config = model.config
    return make_plan(
        heads=config.heads,
        heads_per_kv_head=config.heads_per_kv_head,
        vocabulary=config.vocabulary,
        rank=rank,
        ranks=ranks,
        layout=model.share.plan.layout,
    )
