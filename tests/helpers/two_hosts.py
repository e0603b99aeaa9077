"""A world as it would be on two hosts."""

from __future__ import annotations

from dist_moe.parallel.world import World
from helpers.nodes import on_nodes


def on_two_hosts(world: World) -> World:
    """The world as it would be if the upper third of the ranks were on another host."""
    first = world.size - world.size // 3
    return on_nodes(world, [int(rank >= first) for rank in range(world.size)])
