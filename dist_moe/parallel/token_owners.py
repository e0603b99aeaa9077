"""Which rank keeps which tokens of a step where each token's residual is on one rank alone: pure, without MPI calls.

A group is the ranks that see each other's tokens through shared memory: those of a host, or one rank alone.
N rows of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe.parallel.host_exchange import HostExchange
from dist_moe.split import contiguous

RowNumbers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenGroups:
    """The ranks of each group, and how this rank reaches them.

    Attributes:
        members: The ranks of each group, the first of which speaks for it; ascending by first rank.
        node_of_group: The host of each group.
        links: The messages between the groups' first ranks, by group; None on the other ranks and for one group.
        channel: The shared memory of this rank's group; None for a rank alone.
    """

    members: tuple[tuple[int, ...], ...]
    node_of_group: tuple[int, ...]
    links: HostExchange | None
    channel: Any


@dataclass(frozen=True)
class Owners:
    """A list of rows cut into contiguous runs: one per group, each cut into one per rank; runs may be empty.

    Attributes:
        own: This rank's rows.
        members: The rows of each rank of this rank's group.
        groups: The rows of each group.
        group: This rank's group.
    """

    own: range
    members: tuple[range, ...]
    groups: tuple[range, ...]
    group: int

    @property
    def of_group(self) -> range:
        """The rows of this rank's group."""
        return self.groups[self.group]

    @property
    def count(self) -> int:
        """Rows of the list."""
        return self.groups[-1].stop

    @cached_property
    def row_N(self) -> RowNumbers:
        """The numbers of all rows; made once, as the layers of a step ask for them again and again."""
        return np.arange(self.count, dtype=np.int32)

    def numbers(self, rows: range) -> RowNumbers:
        """The numbers of a run of the list's rows."""
        return self.row_N[rows.start : rows.stop]

    def among(self, chosen: Sequence[int]) -> Owners:
        """Who owns which of some chosen rows, ascending, counted by their place in the choice."""

        def cut(rows: range) -> range:
            first, stop = np.searchsorted(chosen, (rows.start, rows.stop)).tolist()
            return range(first, stop)

        groups = tuple(cut(rows) for rows in self.groups)
        return Owners(cut(self.own), tuple(cut(rows) for rows in self.members), groups, self.group)


def deal_tokens(tokens: int, groups: Sequence[Sequence[int]], rank: int) -> Owners:
    """Cut a step's tokens evenly over the ranks, group by group.

    Args:
        tokens: T.
        groups: The ranks of each group, in the order in which they own tokens; every rank is in one.
        rank: Whose view.
    """
    ranks = sum(len(members) for members in groups)
    runs: list[tuple[range, ...]] = []
    at = 0
    for members in groups:
        runs.append(tuple(contiguous(tokens, ranks, at + place) for place in range(len(members))))
        at += len(members)
    group = next(number for number, members in enumerate(groups) if rank in members)
    whole = tuple(range(members[0].start, members[-1].stop) for members in runs)
    return Owners(runs[group][groups[group].index(rank)], runs[group], whole, group)


def rows_within(row_N: RowNumbers, rows: range) -> RowNumbers:
    """Those of some ascending row numbers that lie in a run of rows."""
    first, stop = np.searchsorted(row_N, (rows.start, rows.stop))
    return row_N[first:stop]
