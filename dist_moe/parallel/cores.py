"""How the ranks of a host share its cores: threads per rank, bindings that are too narrow, and who may spin."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from dist_moe.parallel.cpu_limits import launcher_cores, limited, own_cores, quota_cores
from dist_moe.parallel.launcher import Launcher
from dist_moe.parallel.world import World

Bind = Literal["auto", "keep"]
Mask = frozenset[int]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CoreShare:
    """What one rank gets of its host.

    Attributes:
        mask: The cores that it may run on.
        threads: Its compute threads.
        widened_from: The launcher's binding that was too narrow, or None.
    """

    mask: Mask
    threads: int
    widened_from: Mask | None = None


def share_cores(world: World, launcher: Launcher, bind: Bind = "auto", threads: int | None = None) -> CoreShare:
    """Decide this rank's cores and threads, and take the cores; collective. To be called before threads are made.

    Args:
        world: All ranks.
        launcher: Who started them, and may have bound them.
        bind: "auto" widens a launcher's binding that is narrower than the rank's fair share; "keep" does not.
        threads: As the user asked; None takes the rank's share of the cores.
    """
    own, allowed = own_cores(), launcher_cores(launcher)
    texts = world.gather_texts(json.dumps([sorted(own), sorted(allowed), quota_cores()]))
    local = [json.loads(text) for text, node in zip(texts, world.node_of_rank, strict=True) if node == world.node]
    share = divide(
        [frozenset(mask) for mask, _, _ in local],
        [frozenset(cores) for _, cores, _ in local],
        min((quota for _, _, quota in local if quota is not None), default=None),
        bind,
    )[world.local_rank]
    if share.widened_from is not None:
        os.sched_setaffinity(0, share.mask)
        logger.info(
            "the launcher bound this rank to %s; widened to %s, shared by %d ranks here (--bind keep opts out)",
            describe_cores(share.widened_from),
            describe_cores(share.mask),
            world.local_size,
        )
    return share if threads is None else CoreShare(share.mask, threads, share.widened_from)


def divide(masks: Sequence[Mask], allowed: Sequence[Mask], quota: int | None, bind: Bind) -> list[CoreShare]:
    """The shares of one host's ranks; pure.

    A core is divided evenly among the ranks that may use it. A binding is too narrow if it gives its rank fewer whole
    cores (or, where cores are scarce, less of one) than an even division of the allowed cores would.

    Args:
        masks: Each rank's affinity mask.
        allowed: The cores that each rank's launcher could have given it.
        quota: The cores' worth of time that the cgroup allows, or None.
        bind: As in `share_cores`.
    """
    ranks = len(masks)
    wide = list(masks)
    for rank, (mask, cores) in enumerate(zip(masks, allowed, strict=True)):
        fair = _whole(Fraction(len(cores), ranks))
        if bind == "auto" and mask < cores and _whole(_share(mask, masks)) < fair:
            wide[rank] = cores
    return [
        CoreShare(
            mask=mask,
            threads=max(1, limited(int(_share(mask, wide)), None if quota is None else quota // ranks)),
            widened_from=None if mask == before else before,
        )
        for mask, before in zip(wide, masks, strict=True)
    ]


def may_spin(world: World, threads: int, environ: Mapping[str, str]) -> bool:
    """Whether this host's waiting ranks and threads may spin: only if ranks x threads fit its cores; collective.

    Args:
        world: All ranks.
        threads: Compute threads of this rank.
        environ: DIST_MOE_YIELD=1 forbids it.
    """
    texts = world.gather_texts(json.dumps([sorted(own_cores()), threads, quota_cores()]))
    local = [json.loads(text) for text, node in zip(texts, world.node_of_rank, strict=True) if node == world.node]
    fits = threads_fit(
        [frozenset(mask) for mask, _, _ in local],
        [count for _, count, _ in local],
        min((quota for _, _, quota in local if quota is not None), default=None),
    )
    return environ.get("DIST_MOE_YIELD") != "1" and fits


def thread_cores(world: World, threads: int) -> tuple[int, ...] | None:
    """A core for each of this rank's threads, if those of its host's ranks fill their cores; else None; collective.

    Where cores are to spare, or threads share them, the scheduler places them better.
    """
    texts = world.gather_texts(json.dumps([sorted(own_cores()), threads]))
    local = [json.loads(text) for text, node in zip(texts, world.node_of_rank, strict=True) if node == world.node]
    places = place_threads([frozenset(mask) for mask, _ in local], [count for _, count in local])
    return None if places is None else places[world.local_rank]


def place_threads(masks: Sequence[Mask], threads: Sequence[int]) -> list[tuple[int, ...]] | None:
    """A core of its own for every thread of one host's ranks, if that takes all of their cores; else None; pure.

    Args:
        masks: Each rank's affinity mask.
        threads: Each rank's threads.

    Returns:
        Each rank's cores, ascending. Ranks of few cores choose first.
    """
    free = frozenset().union(*masks)
    if sum(threads) != len(free):
        return None
    places: list[tuple[int, ...]] = [()] * len(masks)
    for rank in sorted(range(len(masks)), key=lambda rank: len(masks[rank])):
        places[rank] = tuple(sorted(masks[rank] & free)[: threads[rank]])
        free -= frozenset(places[rank])
    return places if not free else None


def threads_fit(masks: Sequence[Mask], threads: Sequence[int], quota: int | None) -> bool:
    """Whether every thread of one host's ranks can have a core of its own; pure."""
    if sum(threads) > limited(len(frozenset().union(*masks)), quota):
        return False
    return all(count <= len(mask) for mask, count in zip(masks, threads, strict=True)) and all(
        sum(count for other, count in zip(masks, threads, strict=True) if other <= mask) <= len(mask) for mask in masks
    )


def describe_cores(mask: Mask) -> str:
    """For people: "core 3", "cores 0-7,16-23"."""
    runs: list[list[int]] = []
    for core in sorted(mask):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"core{'' if len(mask) == 1 else 's'} {text}"


def _share(mask: Mask, masks: Sequence[Mask]) -> Fraction:
    """Cores of a rank when each of its cores is divided evenly among the ranks that may use it."""
    return sum((Fraction(1, sum(core in other for other in masks)) for core in mask), Fraction(0))


def _whole(share: Fraction) -> Fraction:
    """Whole cores, which make threads; less than one stays as it is."""
    return Fraction(int(share)) if share >= 1 else share
