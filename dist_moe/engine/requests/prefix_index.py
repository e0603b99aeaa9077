"""Finished sequences whose keys and values are still there, so that a prompt that begins like one is not computed anew.

K and V of a position depend on the tokens up to it alone, and their bits not on how those were cut into steps: what is
reused equals what would be computed (NUMERICS rules 9 and 10). Pure bookkeeping, on rank 0.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import BLOCK_POSITIONS
from dist_moe.model.step import Fork

Ids = npt.NDArray[np.int32]


def blocks_of(positions: int) -> int:
    """KV blocks that a sequence of so many positions takes."""
    return -(-positions // BLOCK_POSITIONS)


def common_prefix(a_T: Ids, b_T: Ids) -> int:
    """Tokens at the beginning of two texts (int32) that are equal."""
    shorter = min(len(a_T), len(b_T))
    differs_T = a_T[:shorter] != b_T[:shorter]
    return int(differs_T.argmax()) if differs_T.any() else shorter


class PrefixIndex:
    """The resident sequences, the least recently used first, and what the next step is to do with KV caches."""

    def __init__(self, most_positions: int) -> None:
        """Begin without any.

        Args:
            most_positions: What running and resident sequences may hold together, whole blocks; 0 keeps nothing.
        """
        self._most_blocks = blocks_of(most_positions)
        self._residents: OrderedDict[int, Ids] = OrderedDict()
        self._forks: list[Fork] = []
        self._released: list[int] = []
        self._names = 0

    def __len__(self) -> int:
        return len(self._residents)

    def new_sequences(self, count: int = 1) -> int:
        """The first of so many consecutive names that no sequence had before."""
        first, self._names = self._names, self._names + count
        return first

    def fits(self, positions: int) -> bool:
        """Whether a sequence of so many positions could stay resident."""
        return blocks_of(positions) <= self._most_blocks

    def find(self, ids: Sequence[int]) -> tuple[int, int]:
        """The resident sequence that a text has most in common with.

        Returns:
            Its name, and how many tokens at the beginning are equal: 0 if no resident begins with the text's first.
        """
        ids_T = np.array(ids, dtype=np.int32)
        found = [(common_prefix(held_T, ids_T), name) for name, held_T in self._residents.items()]
        positions, name = max(found, default=(0, -1))
        if positions:
            self._residents.move_to_end(name)
        return name, positions

    def latest(self) -> tuple[int, ...]:
        """What the resident sequence that was used last holds; empty if there is none."""
        newest = next(reversed(self._residents.values()), None)
        return () if newest is None else tuple(newest.tolist())

    def keep(self, sequence: int, ids: Sequence[int]) -> None:
        """A sequence has ended and holds K and V of these tokens; what is the beginning of another one is released."""
        ids_T = np.array(ids, dtype=np.int32)
        holds_nothing_yet = any(fork.sequence == sequence for fork in self._forks)
        if not self._most_blocks or not len(ids_T) or holds_nothing_yet:
            self.release(sequence)
            return
        for name, held_T in list(self._residents.items()):
            shared = common_prefix(held_T, ids_T)
            if shared == len(held_T):
                self._evict(name)
            elif shared == len(ids_T):
                self._residents.move_to_end(name)
                self.release(sequence)
                return
        self._residents[sequence] = ids_T
        self.make_room(0)

    def fork(self, sequence: int, source: int, positions: int) -> None:
        """Let a new sequence begin with the first positions (at least one) of what another one holds."""
        self._forks.append(Fork(sequence, source, positions))

    def release(self, sequence: int) -> None:
        """A sequence has ended and is of no more use."""
        self._released.append(sequence)

    def make_room(self, running_blocks: int) -> None:
        """Release what has not been used for longest until the rest fits beside the running sequences.

        Blocks that sequences share are counted for each of them: what goes too early is at most a tail that no running
        sequence has in common.
        """
        blocks = running_blocks + sum(blocks_of(len(held_T)) for held_T in self._residents.values())
        while self._residents and blocks > self._most_blocks:
            name = next(iter(self._residents))
            blocks -= blocks_of(len(self._residents[name]))
            self._evict(name)

    def take_orders(self) -> tuple[tuple[Fork, ...], tuple[int, ...]]:
        """The forks and the released sequences since the last call, for the next step."""
        orders = tuple(self._forks), tuple(self._released)
        self._forks, self._released = [], []
        return orders

    def _evict(self, name: int) -> None:
        del self._residents[name]
        self.release(name)
