"""What machines allow, for `dist-moe plan`: the reading loop and the arithmetic of bench, without a model."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from dist_moe.engine.measuring.bench_bound import Machine
from dist_moe.engine.measuring.bench_machine import FINALISTS, PASSES, WAYS, columns_in_cache
from dist_moe.engine.planning.prediction import Nodes
from dist_moe.engine.start.available_memory import available_memory
from dist_moe.engine.start.job import Job
from dist_moe.engine.start.startup import open_exchange
from dist_moe.errors import UsageError
from dist_moe.kernels import Kernels, WeightFormat
from dist_moe.parallel.cores import may_spin, share_cores
from dist_moe.parallel.world import World

_READ_BYTES = 1 << 30
_SAMPLE_BYTES = 1 << 28  # to choose the best way to read
_PEAK_S = 0.05
_FIRST_ROUNDS = 256
_TILE_ROWS, _GROUP = 32, 32  # of the matrix in L1


@dataclass(frozen=True)
class Hosts:
    """The hosts of a job.

    Attributes:
        nodes: As many as the job has, each like the slowest of them; the link is measured between them.
        memory_bytes: That the host with least memory can take.
    """

    nodes: Nodes
    memory_bytes: int


def measure_hosts(job: Job, threads: int | None, fmt: WeightFormat, read: float | None) -> Hosts:
    """Measure all hosts of a job at once, and the network between them; collective, equal on all ranks.

    Args:
        job: Of at least two hosts.
        threads: Of each rank; None: its share of the host's cores.
        fmt: The format of the weights, for our matmul.
        read: Bytes/s of a node that are known already; None measures.

    Raises:
        AgreedError: All ranks are on one host.
    """
    world = job.world
    _require_hosts(world, "--net measured", "plan", "take a net by its name")
    own = share_cores(world, job.launcher, threads=threads).threads
    link = open_exchange(world, may_spin(world, own, os.environ), os.environ).link_costs
    assert link is not None
    machine, isa = measure_machine(own, fmt, None if read is None else read / world.local_size, 1 / world.local_size)
    facts = [machine.read, machine.int8, machine.f32, available_memory().available_bytes, own, isa]
    ranks = [json.loads(text) for text in world.gather_texts(json.dumps(facts))]
    hosts = [[ranks[rank] for rank, where in enumerate(world.node_of_rank) if where == n] for n in range(world.nodes)]
    slowest = Machine(*(min(sum(facts[i] for facts in host) for host in hosts) for i in range(3)))
    most_ranks, memory_bytes = max(map(len, hosts)), min(facts[3] for facts in ranks)
    return Hosts(Nodes(world.nodes, most_ranks, ranks[0][4], slowest, link, ranks[0][5]), memory_bytes)


def reading_weights(job: Job) -> list[tuple[str, float, int]]:
    """Measure how fast each host of a job reads memory, all ranks at once; collective, equal on all ranks.

    Returns:
        By host its name, bytes/s, and that as a weight: 10 for the slowest.

    Raises:
        AgreedError: All ranks are on one host.
    """
    world = job.world
    _require_hosts(world, "--weights measured", "place", "give numbers")
    with Kernels(share_cores(world, job.launcher, threads=None).threads) as kernels:
        texts = world.gather_texts(repr(_read_speed(kernels, 1 / world.local_size)))
    speeds = [
        sum(float(texts[rank]) for rank, where in enumerate(world.node_of_rank) if where == node)
        for node in range(world.nodes)
    ]
    names = [world.hosts[world.node_of_rank.index(node)] for node in range(world.nodes)]
    return [(name, speed, round(10 * speed / min(speeds))) for name, speed in zip(names, speeds, strict=True)]


def _require_hosts(world: World, option: str, command: str, other: str) -> None:
    """Refuse to measure hosts where there is one; collective."""
    with world.together("measuring"):
        if world.nodes == 1:
            raise UsageError(
                f"{option}: all ranks are on {world.hosts[0]}; start with mpirun on the hosts that shall be measured "
                f"(mpirun -f hosts dist-moe {command} ...), or {other}"
            )


def measure_machine(threads: int, fmt: WeightFormat, read: float | None, share: float = 1.0) -> tuple[Machine, str]:
    """Measure with `threads` threads; takes about two seconds.

    Args:
        threads: As many as will compute on a node.
        fmt: The format of the weights, for our matmul.
        read: Bytes/s that are known already; None measures.
        share: Of the memory that is read on this host, where several processes measure at once.

    Returns:
        What was found, and the kernels' level.
    """
    with Kernels(threads) as kernels:
        bytes_per_s = _read_speed(kernels, share) if read is None else read
        matmul = max(
            _best(partial(kernels.matmul_peak, _TILE_ROWS, columns_in_cache(fmt, tokens), tokens, fmt, _GROUP))
            for tokens in (8, 16, 32)
        )
        return Machine(bytes_per_s, matmul, _best(kernels.f32_peak)), kernels.isa


def _read_speed(kernels: Kernels, share: float) -> float:
    """Bytes per second over anonymous memory, in the best way."""
    size = int(_READ_BYTES * share)
    if free := available_memory().available_bytes:
        size = max(1 << 24, min(size, int(free * share / 4)))
    data = np.ones(size, np.uint8)
    kernels.read_seconds(data, 4, 0)
    sample = data[:_SAMPLE_BYTES]
    ways = sorted(WAYS, key=lambda way: kernels.read_seconds(sample, *way)[0])[:FINALISTS]
    return size / min(kernels.read_seconds(data, *way)[0] for way in ways for _ in range(PASSES))


def _best(run: Callable[[int], float]) -> float:
    """The best of a few passes, each so long that starting the threads does not count."""
    started_s = time.perf_counter()
    run(_FIRST_ROUNDS)
    rounds = max(1, int(_FIRST_ROUNDS * _PEAK_S / (time.perf_counter() - started_s)))
    return max(run(rounds) for _ in range(PASSES))
