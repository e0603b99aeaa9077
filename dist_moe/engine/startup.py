"""What all ranks must agree on before the first step."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from dist_moe.errors import EnvironmentMismatch, UsageError
from dist_moe.kernels import Kernels, NodeMemory
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.mpi import allowed_cores
from dist_moe.parallel.node_exchange import NodeExchange
from dist_moe.parallel.plan import EXPERT_LAYOUTS
from dist_moe.parallel.world import World
from dist_moe.store.reader import Store

Made = TypeVar("Made")
logger = logging.getLogger(__name__)

# Pauses before a rank that waits for its host's others sleeps: 15 to 100 us, by CPU; waking takes about 10 us.
WAITING_SPINS = 2000


def agreed(world: World, phase: str, make: Callable[[], Made]) -> Made:
    """Make something on every rank, or fail on all of them; collective.

    Raises:
        AgreedError: `make` raised a planned error on some rank.
    """
    made: list[Made] = []
    with world.together(phase):
        made.append(make())
    return made[0]


def open_exchange(world: World, threads: int, environ: Mapping[str, str]) -> Exchange:
    """Through shared memory inside each host where all hosts allow it, else by MPI alone; collective.

    Args:
        world: All ranks.
        threads: Compute threads of this rank; where they and the ranks exceed the cores, waiting ranks do not spin.
        environ: DIST_MOE_SHARED_MEMORY=0 asks for MPI alone, DIST_MOE_YIELD=1 for no spinning.
    """
    if world.nodes == world.size:
        return Exchange(world)
    first = world.node_of_rank.index(world.node)
    name = f"/dist-moe-{world.gather_texts(secrets.token_hex(8))[first]}"
    gentle = environ.get("DIST_MOE_YIELD") == "1" or world.local_size * threads > allowed_cores()
    node, failure = None, "off" if environ.get("DIST_MOE_SHARED_MEMORY") == "0" else ""
    for turn in ("create", "open"):
        if not failure and (world.local_rank == 0) == (turn == "create"):
            try:
                node = NodeMemory(name, world.local_rank, world.local_size, 0 if gentle else WAITING_SPINS)
            except EnvironmentMismatch as error:
                failure = str(error)
        failures = [text for text in world.gather_texts(failure) if text]
    if node is not None and world.local_rank == 0:
        node.unlink()
    if failures or node is None:
        logger.info("ranks of one host exchange by MPI, not through shared memory: %s", failures[0])
        return Exchange(world)
    return NodeExchange(world, node)


def choose_layout(store: Store, exchange: Exchange, wanted: str) -> str:
    """Turn `auto` into a layout: shared if every rank can read every chunk, else whole; collective."""
    if wanted != "auto":
        if wanted not in EXPERT_LAYOUTS:
            raise UsageError(f"--experts {wanted}: expected auto, {', '.join(EXPERT_LAYOUTS)}")
        return wanted
    complete = np.array([not store.missing_files], dtype=np.int32)
    exchange.min_faults(complete)
    return "shared" if complete[0] else "whole"


def agree_on_numerics(world: World, exchange: Exchange, kernels: Kernels) -> None:
    """Compare the ranks' known-answer hashes (NUMERICS rule 16); collective.

    Raises:
        AgreedError: A rank computes other bits; the message names it.
    """
    hashes = exchange.gather_equal(np.array([kernels.self_test()], dtype=np.uint64).view(np.int64))
    error = None
    if hashes is not None:
        odd = [rank for rank, own in enumerate(hashes[:, 0]) if own != hashes[0, 0]]
        if odd:
            error = EnvironmentMismatch(
                f"rank(s) {', '.join(map(str, odd))} compute other bits than rank 0 in the kernels' self-test: install "
                "the same version of dist-moe everywhere, and check that host's memory and CPU"
            )
    world.agree(error, "self-test")
