"""Which shard files each host has, the job's plan from that, and what no host has, in words."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_moe.engine.start.agreement import StartRecord
from dist_moe.engine.start.rank_table import name_hosts, number_runs
from dist_moe.errors import StoreError, UsageError
from dist_moe.parallel.holdings import Held, Holdings, chunk_counts
from dist_moe.parallel.plan import EXPERT_LAYOUTS, JobPlan, Plan, plan_job, usable_heads
from dist_moe.parallel.world import World
from dist_moe.store.layout import shard_command, source_note
from dist_moe.store.manifest import Manifest
from dist_moe.store.placement import Runs, indices_of, shard_name
from dist_moe.store.reader import Store
from dist_moe.store.units import UnitKind, unit_count

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inventory:
    """What each node has, by node.

    Attributes:
        hosts: Names.
        directories: Where the store lies there.
        shards: Numbers of the shard files (from 0) that lie there.
    """

    hosts: tuple[str, ...]
    directories: tuple[str, ...]
    shards: tuple[frozenset[int], ...]


def take_inventory(world: World, store: Store, records: Sequence[StartRecord]) -> Inventory:
    """Tell each other which shard files are here; collective.

    Args:
        world: All ranks.
        store: The open store; its manifest is the same on all ranks.
        records: What the ranks reported, by rank.

    Raises:
        StoreError: Ranks of one host see different files; raised on all ranks alike.
    """
    here = np.array([name in store.present_files for name in shard_names(store.manifest)])
    found = [frozenset(_numbers(data, len(here))) for data in world.gather_equal_bytes(np.packbits(here).tobytes())]
    firsts = [world.node_of_rank.index(node) for node in range(world.nodes)]
    for rank, node in enumerate(world.node_of_rank):
        if found[rank] != found[firsts[node]]:
            raise StoreError(_unlike(world, store.manifest, found, firsts[node], rank))
    return Inventory(
        tuple(world.hosts[rank] for rank in firsts),
        tuple(records[rank].directory for rank in firsts),
        tuple(found[rank] for rank in firsts),
    )


def plan_from_inventory(
    world: World,
    manifest: Manifest,
    inventory: Inventory,
    wanted: str,
    has_room: Callable[[Sequence[Plan]], bool] = lambda _: True,
) -> JobPlan:
    """Every rank's share of what its node has; equal on all ranks, so nothing is exchanged.

    Args:
        world: All ranks.
        manifest: The store's.
        inventory: What the nodes have.
        wanted: `--experts`.
        has_room: Whether each node's memory holds all that a plan lets it read; equal on all ranks.

    Raises:
        StoreError: Units are on no host.
        UsageError: There is no such layout.
    """
    held = holdings_of(manifest, inventory.shards)
    lines = tuple(missing_units(manifest, held, inventory))
    if lines:
        raise StoreError("\n".join(lines))
    layout, config = choose_layout(wanted), manifest.config
    idle = world.size - config.heads
    if idle > 0 and world.is_leader:
        words = "%d ranks for %d query heads: %d have no part in attention; fewer ranks with more --threads are quicker"
        logger.warning(words, world.size, config.heads, idle)
    where, speeds = world.node_of_rank, placed_speeds(manifest, inventory)
    job = plan_job(config, manifest.group_size, layout, node_of_rank=where, holdings=held, speeds=speeds)
    if wanted == "auto" and world.nodes > 1 and not has_room(job.plans):
        logger.info("--experts whole: hosts hold more experts than their memory, so each keeps to its part of them")
        return plan_job(config, manifest.group_size, "whole", node_of_rank=where, holdings=held, speeds=speeds)
    return job


def choose_layout(wanted: str) -> str:
    """Turn `auto` into a layout: shared, which gives each step's work to the hosts that hold the experts.

    Raises:
        UsageError: There is no such layout.
    """
    if wanted not in ("auto", *EXPERT_LAYOUTS):
        raise UsageError(f"--experts {wanted}: expected auto, {', '.join(EXPERT_LAYOUTS)}")
    return "shared" if wanted == "auto" else wanted


def placed_speeds(manifest: Manifest, inventory: Inventory) -> tuple[int, ...] | None:
    """The nodes' weights of a placed store of which each node has one shard; None: nobody said how fast they are."""
    weights = manifest.node_weights
    if not weights or any(len(shards) != 1 for shards in inventory.shards):
        return None
    return tuple(weights[shard] for shards in inventory.shards for shard in shards)


def holdings_of(manifest: Manifest, shards: Sequence[frozenset[int]]) -> Holdings:
    """The units in these shards.

    Args:
        manifest: The store's.
        shards: Of each node, numbers of shards (from 0).
    """
    made: dict[tuple[Runs, ...], Held] = {}

    def held(kind: UnitKind, layer: int) -> Held:
        runs = tuple(shard.runs(kind, layer) for shard in manifest.shards)
        units = unit_count(manifest.config, manifest.group_size, kind, layer)
        if kind != "chunk" or runs not in made:
            made[runs] = _held(runs, shards, units)
        return made[runs]

    return Holdings(
        heads_NH=held("head", 0),
        kv_heads_NG=held("kv_head", 0),
        vocabulary_NB=held("vocabulary", 0),
        chunks_NC=tuple(held("chunk", layer) for layer in range(manifest.config.layers)),
    )


def missing_units(manifest: Manifest, held: Holdings, inventory: Inventory) -> Iterator[str]:
    """One sentence for each shard file that a host must get, since no host has its units, and one for what none has."""
    everything = holdings_of(manifest, [frozenset([shard]) for shard in range(manifest.nodes)])
    usable_NH = usable_heads(held, manifest.config.heads_per_kv_head)
    lacking: list[Held] = [np.logical_not(np.any(held_NU, axis=0)) for held_NU in (usable_NH, *_arrays(held)[1:])]
    absent = [shard for shard in range(manifest.nodes) if not any(shard in shards for shards in inventory.shards)]
    for shard in absent:
        brings = [wanted_U & held_NU[shard] for wanted_U, held_NU in zip(lacking, _arrays(everything), strict=True)]
        if any(brought_U.any() for brought_U in brings):
            lacking = [wanted_U & ~brought_U for wanted_U, brought_U in zip(lacking, brings, strict=True)]
            yield _missing(manifest, inventory, shard, brings)
    if any(wanted_U.any() for wanted_U in lacking):
        yield (
            f"{', '.join(_describe(manifest, lacking))}: no host of this job ({name_hosts(inventory.hosts)}) has that "
            "with all that it needs, a query head with its KV head; give each host whole shards of one store"
        )


def shard_names(manifest: Manifest) -> list[str]:
    """The names of all shard files, by number."""
    return [shard_name(shard, manifest.nodes) for shard in range(manifest.nodes)]


def _held(runs: Sequence[Runs], shards: Sequence[frozenset[int]], units: int) -> Held:
    held_NU = np.zeros((len(shards), units), np.bool_)
    for node, numbers in enumerate(shards):
        for shard in numbers:
            held_NU[node, indices_of(runs[shard])] = True
    return held_NU


def _arrays(held: Holdings) -> list[Held]:
    return [held.heads_NH, held.kv_heads_NG, held.vocabulary_NB, *held.chunks_NC]


def _missing(manifest: Manifest, inventory: Inventory, shard: int, brings: Sequence[npt.NDArray[np.bool_]]) -> str:
    name = shard_name(shard, manifest.nodes)
    emptiest = min(range(len(inventory.hosts)), key=lambda node: len(inventory.shards[node]))
    host, directory = inventory.hosts[emptiest], Path(inventory.directories[emptiest])
    return (
        f"{directory / name} is missing on {name_hosts(inventory.hosts)}: it holds "
        f"{', '.join(_describe(manifest, brings))}, which no other file of this job has; copy it from where it is: "
        f"scp MACHINE:STORE/{name} {host}:{directory}/, or make it there: {shard_command(manifest, directory)} "
        f"({source_note(manifest)})"
    )


def _describe(manifest: Manifest, brings: Sequence[npt.NDArray[np.bool_]]) -> Iterator[str]:
    """Kinds and ranges: "query heads 4-7, KV head 1, vocabulary block 2, layers 0-3: experts 4-7"."""
    heads, kv_heads, blocks, *chunks = (np.flatnonzero(brought_U).tolist() for brought_U in brings)
    for kind, units in (("query head", heads), ("KV head", kv_heads), ("vocabulary block", blocks)):
        if units:
            yield _counted(kind, units)
    layers_of: dict[str, list[int]] = {}
    for layer, units in enumerate(chunks):
        if units:
            experts, per_expert = chunk_counts(manifest.config, manifest.group_size, layer)
            touched = sorted({unit // per_expert for unit in units})
            whole = len(units) == len(touched) * per_expert
            words = _counted("expert", touched) if whole else f"chunks of {_counted('expert', touched)}"
            layers_of.setdefault(words if experts > 1 else _counted("chunk", units), []).append(layer)
    for words, layers in layers_of.items():
        yield f"{words} of {_counted('layer', layers)}"


def _counted(kind: str, numbers: Sequence[int]) -> str:
    return f"{kind}{'s' if len(numbers) > 1 else ''} {number_runs(numbers)}"


def _unlike(world: World, manifest: Manifest, found: Sequence[frozenset[int]], first: int, other: int) -> str:
    names = [shard_name(shard, manifest.nodes) for shard in sorted(found[first] ^ found[other])]
    who, lacks = (first, other) if sorted(found[first] ^ found[other])[0] in found[first] else (other, first)
    return (
        f"ranks {first} and {other} on {world.hosts[first]} see different shard files: rank {who} has {names[0]}, "
        f"rank {lacks} has not; give all ranks of a host the same -m"
    )


def _numbers(data: bytes, count: int) -> Iterable[int]:
    here: list[int] = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), count=count)).tolist()
    return here
