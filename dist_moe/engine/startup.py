"""What all ranks must agree on before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from dist_moe.errors import EnvironmentMismatch, UsageError
from dist_moe.kernels import Kernels
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.plan import EXPERT_LAYOUTS
from dist_moe.parallel.world import World
from dist_moe.store.reader import Store

Made = TypeVar("Made")


def agreed(world: World, phase: str, make: Callable[[], Made]) -> Made:
    """Make something on every rank, or fail on all of them; collective.

    Raises:
        AgreedError: `make` raised a planned error on some rank.
    """
    made: list[Made] = []
    with world.together(phase):
        made.append(make())
    return made[0]


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
