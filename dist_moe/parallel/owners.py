"""Units to the nodes that hold them, so that all ranks get as equal a part as the files allow. Pure.

Shape suffixes: N nodes, U units, S sets of holders that occur.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Held = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


def balanced_owners(held_NU: Held, ranks_N: Sequence[int], load_N: Sequence[int] | None = None) -> Counts:
    """The node that computes each unit: one that holds it; no other choice has a lower busiest rank, nor second one.

    Units with the same holders go to them in contiguous runs, in the nodes' order; where every node holds all units,
    the ranks get what `contiguous` gives them.

    Args:
        held_NU: Which node holds which unit.
        ranks_N: Ranks of each node, at least one; they share the node's units evenly.
        load_N: Units that each node has already.

    Returns:
        int64 [U], -1 where no node holds the unit.
    """
    holders_SN, set_U = np.unique(held_NU.T, axis=0, return_inverse=True)
    set_U = set_U.reshape(-1)
    filling = _Filling(holders_SN, ranks_N, load_N or [0] * len(ranks_N))
    if holders_SN.shape[0] == 1 and holders_SN.all():
        filling.add_anywhere(0, len(set_U))
    else:
        for number in set_U.tolist():
            filling.add(number)
    owner_U = np.full(held_NU.shape[1], -1, np.int64)
    for number, counts_N in enumerate(filling.counts_SN):
        if holders_SN[number].any():
            owner_U[set_U == number] = np.repeat(np.arange(len(counts_N)), counts_N)
    return owner_U


class _Filling:
    """Adds units one by one, each to the least loaded node that it, or units moved to make room, can reach.

    Loads form a polymatroid, so adding where the next unit costs least stays optimal (Federgruen, Groenevelt 1986).
    """

    def __init__(self, holders_SN: Held, ranks_N: Sequence[int], load_N: Sequence[int]) -> None:
        self._holders_SN = holders_SN
        self._ranks_N = ranks_N
        self._load_N = list(load_N)
        self.counts_SN: Counts = np.zeros(holders_SN.shape, np.int64)

    def add(self, number: int) -> None:
        """One more unit with this set of holders."""
        nodes = np.flatnonzero(self._holders_SN[number]).tolist()
        if not nodes:
            return
        best = min(nodes, key=self._price)
        least = min(range(len(self._load_N)), key=self._price)
        if self._price(best)[0] > self._price(least)[0]:
            came_from = self._reach(nodes)
            best = min(came_from, key=self._price)
            self._load_N[best] += 1
            best = self._make_room(best, came_from)
        else:
            self._load_N[best] += 1
        self.counts_SN[number, best] += 1

    def add_anywhere(self, number: int, units: int) -> None:
        """As `add` for each of so many units that all nodes hold."""
        prices = [self._price(node) for node in range(len(self._load_N))]
        heapq.heapify(prices)
        for _ in range(units):
            _, node = prices[0]
            self._load_N[node] += 1
            self.counts_SN[number, node] += 1
            heapq.heapreplace(prices, self._price(node))

    def _price(self, node: int) -> tuple[int, int]:
        """What a rank of the node has at least, and the node's number for ties."""
        return self._load_N[node] // self._ranks_N[node], node

    def _reach(self, nodes: Sequence[int]) -> dict[int, int]:
        """All nodes that can take a unit, each with the node that hands one over to it (itself: the first ones)."""
        can_move_NN = (self.counts_SN.T > 0).astype(np.int64) @ self._holders_SN.astype(np.int64) > 0
        came_from = {node: node for node in nodes}
        queue = list(nodes)
        for node in queue:
            for other in np.flatnonzero(can_move_NN[node]).tolist():
                if other not in came_from:
                    came_from[other] = node
                    queue.append(other)
        return came_from

    def _make_room(self, node: int, came_from: dict[int, int]) -> int:
        """Hand one unit on along the path to `node`; returns the node that has room then."""
        while came_from[node] != node:
            before = came_from[node]
            moved = int(np.flatnonzero((self.counts_SN[:, before] > 0) & self._holders_SN[:, node])[0])
            self.counts_SN[moved, before] -= 1
            self.counts_SN[moved, node] += 1
            node = before
        return node
