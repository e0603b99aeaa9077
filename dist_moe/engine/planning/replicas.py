"""Experts of one layer onto nodes: hot ones on several, all nodes alike busy.

The greedy part is that of DeepSeek's EPLB: one more copy for whichever expert has most load per copy, then the
heaviest copies first, each to the least busy node that has room. A local search over recorded picks follows, since
what counts is which experts fire together. Shape suffixes: E experts, N nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from dist_moe.parallel.holdings import Held

Loads = npt.NDArray[np.float64]

PROPOSALS = 300  # of a layer's local search
_NOTHING_TO_GAIN = 1e-3


def copies_of(load_E: Loads, slots: int, most: int) -> npt.NDArray[np.int64]:
    """How many copies each expert gets, int64 [E]: at least one and at most `most`, `slots` in all if that is possible.

    Args:
        load_E: How often each expert is picked.
        slots: Room for so many copies; at least E.
        most: Nodes.
    """
    copies_E = np.ones(len(load_E), np.int64)
    for _ in range(min(slots, most * len(load_E)) - len(load_E)):
        share_E = np.where(copies_E < most, load_E / copies_E, -1.0)
        copies_E[int(share_E.argmax())] += 1
    return copies_E


def pack(load_E: Loads, slots_N: Sequence[int], speeds: Sequence[int]) -> Held:
    """A first placement, bool [N, E]; no node holds an expert twice or more experts than it has slots.

    Args:
        load_E: How often each expert is picked.
        slots_N: Room of each node; E or more in all, and at most E on each.
        speeds: Of the nodes.
    """
    nodes, experts = len(slots_N), len(load_E)
    copies_E = copies_of(load_E, sum(slots_N), nodes)
    share_E = load_E / copies_E
    held_NE = np.zeros((nodes, experts), np.bool_)
    room_N, busy_N, speed_N = np.array(slots_N), np.zeros(nodes), np.array(speeds, np.float64)

    def put(expert: int) -> None:
        free_N = (room_N > 0) & ~held_NE[:, expert]
        if not free_N.any():
            return
        node = int(np.where(free_N, (busy_N + share_E[expert]) / speed_N, np.inf).argmin())
        held_NE[node, expert] = True
        room_N[node] -= 1
        busy_N[node] += share_E[expert]

    order = np.argsort(-share_E, kind="stable").tolist()
    for expert in order:  # every expert once, before the copies of others take the last room
        put(expert)
    for expert in order:
        for _ in range(int(copies_E[expert]) - 1):
            put(expert)
    for expert in np.argsort(-load_E, kind="stable").tolist() * nodes:  # what the packing left over
        put(expert)
    return held_NE


def improve(
    held_NE: Held, cost: Callable[[Held], float], generator: np.random.Generator, proposals: int = PROPOSALS
) -> Held:
    """A placement that costs no more: random exchanges and replacements, of which the better ones stay.

    Args:
        held_NE: Where to begin; each expert is somewhere.
        cost: Of a placement, 1 or more.
        generator: Decides what is tried.
        proposals: How often.
    """
    best_NE, best = held_NE.copy(), cost(held_NE)
    for _ in range(proposals):
        if best < 1.0 + _NOTHING_TO_GAIN:
            break
        tried_NE = _changed(best_NE, generator)
        if tried_NE is None:
            continue
        found = cost(tried_NE)
        if found < best:
            best_NE, best = tried_NE, found
    return best_NE


def _changed(held_NE: Held, generator: np.random.Generator) -> Held | None:
    """Two nodes exchange an expert, or one replaces an expert that others have, too; None if that is not possible."""
    a, b = generator.permutation(len(held_NE))[:2] if len(held_NE) > 1 else (0, 0)
    changed_NE = held_NE.copy()
    if generator.random() < 0.5:
        of_a, of_b = np.flatnonzero(held_NE[a] & ~held_NE[b]), np.flatnonzero(held_NE[b] & ~held_NE[a])
        if not len(of_a) or not len(of_b):
            return None
        given, taken = generator.choice(of_a), generator.choice(of_b)
        changed_NE[a, [given, taken]] = (False, True)
        changed_NE[b, [given, taken]] = (True, False)
        return changed_NE
    spare, lacking = np.flatnonzero(held_NE[a] & (held_NE.sum(axis=0) > 1)), np.flatnonzero(~held_NE[a])
    if not len(spare) or not len(lacking):
        return None
    changed_NE[a, [generator.choice(spare), generator.choice(lacking)]] = (False, True)
    return changed_NE
