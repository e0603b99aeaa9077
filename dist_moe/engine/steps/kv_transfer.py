"""K and V of a sequence between all ranks and rank 0, layer by layer; a KV head that several ranks hold travels once.

n positions · G KV heads · g KV heads of one rank · B bytes of a position of one KV head
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import BLOCK_POSITIONS
from dist_moe.model.transformer import Transformer
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.plan import in_order

Rows = npt.NDArray[np.uint8]
RowsSink = Callable[[Rows], None]  # told uint8 [n, G, B] for the next n positions of a layer, layer after layer
RowsSource = Callable[[int, int, int], Rows]  # from a layer and its positions [first, stop) to uint8 [n, G, B]

PIECE_POSITIONS = 16 * BLOCK_POSITIONS


class KvTransfer:
    """One rank's part. Every method is collective: all ranks call it alike."""

    def __init__(self, model: Transformer, exchange: Exchange) -> None:
        """Find out who sends which KV heads.

        Args:
            model: This rank's part of the model.
            exchange: The collectives.
        """
        self._model, self._exchange = model, exchange
        self._kv_heads = list(model.share.plan.kv_heads)
        self._sent = model.share.job.kv_senders()
        self._place_G = in_order(head for sent in self._sent for head in sent)  # of each head in what rank 0 gets

    def gather(self, sequence: int, positions: int, sink: RowsSink | None) -> None:
        """Show rank 0 the first positions of a sequence.

        Args:
            sequence: Whose; it holds at least `positions`.
            positions: How many.
            sink: On rank 0, must not raise: the other ranks wait for all of it to be fetched.
        """
        model, cache = self._model, self._model.cache
        own = self._sent[model.share.plan.rank]
        columns = [self._kv_heads.index(head) for head in own]
        words = cache.row_bytes // 4
        counts = [len(heads) * words for heads in self._sent]
        out = np.empty((PIECE_POSITIONS, sum(counts)), np.float32) if sink is not None else None
        for layer, first, stop in self._pieces(positions):
            rows = np.ascontiguousarray(cache.read(sequence, layer, first, stop)[:, columns])
            local = rows.reshape(stop - first, len(own) * cache.row_bytes).view(
                np.float32
            )  # bits: nothing computes with them
            found = self._exchange.gather_columns(local, counts, None if out is None else out[: stop - first])
            if sink is not None and found is not None:
                sink(found.view(np.uint8).reshape(stop - first, -1, cache.row_bytes)[:, self._place_G])

    def scatter(self, sequence: int, positions: int, source: RowsSource | None) -> None:
        """Give a new sequence the positions that rank 0 has.

        Args:
            sequence: Its name.
            positions: How many.
            source: On rank 0, must not raise.
        """
        cache = self._model.cache
        whole = np.empty((PIECE_POSITIONS, self._model.config.kv_heads, cache.row_bytes), np.uint8)
        for layer, first, stop in self._pieces(positions):
            rows = whole[: stop - first]
            if source is not None:
                rows[:] = source(layer, first, stop)
            self._exchange.broadcast(rows)
            cache.write(sequence, layer, first, rows[:, self._kv_heads])

    def _pieces(self, positions: int) -> Iterator[tuple[int, int, int]]:
        for layer in range(self._model.config.layers):
            for first in range(0, positions, PIECE_POSITIONS):
                yield layer, first, min(first + PIECE_POSITIONS, positions)
