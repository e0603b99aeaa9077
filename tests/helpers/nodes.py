"""Worlds whose ranks are on other nodes than they are, all of it on one host."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from dist_moe.parallel.world import World


def on_nodes(world: World, node_of_rank: Sequence[int]) -> World:
    """The world as it would be with its ranks on these nodes, which count by their lowest rank."""
    there = copy.copy(world)
    there.node_of_rank = tuple(node_of_rank)
    there.hosts = tuple(f"host-{node}" for node in node_of_rank)
    local = [rank for rank in range(world.size) if there.node_of_rank[rank] == there.node]
    there.local_rank, there.local_size = local.index(world.rank), len(local)
    return there


def on_two_hosts(world: World) -> World:
    """The world as it would be if the upper third of the ranks were on another host."""
    first = world.size - world.size // 3
    return on_nodes(world, [int(rank >= first) for rank in range(world.size)])
