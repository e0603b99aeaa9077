"""Ranks of one machine as if they were on two hosts."""

from __future__ import annotations

import copy

from dist_moe.parallel.world import World


def on_two_hosts(world: World) -> World:
    """The world as it would be if the upper third of the ranks were on another host."""
    there = copy.copy(world)
    first = world.size - world.size // 3
    there.node_of_rank = tuple(int(rank >= first) for rank in range(world.size))
    local = [rank for rank in range(world.size) if there.node_of_rank[rank] == there.node]
    there.local_rank, there.local_size = local.index(world.rank), len(local)
    return there
