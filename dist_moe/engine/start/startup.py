"""What all ranks must agree on before the first step."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import TypeVar

from dist_moe.errors import EnvironmentMismatch, StoreError, UsageError
from dist_moe.kernels import NodeMemory, SumsCodec, WireFormat, catch_bus_errors, linger_after_crash
from dist_moe.parallel.cost import LinkCosts
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.host_exchange import HostExchange
from dist_moe.parallel.host_sums import HostSums
from dist_moe.parallel.node_exchange import NodeExchange
from dist_moe.parallel.probe import DEFAULT_COSTS, probe_links
from dist_moe.parallel.world import World

Made = TypeVar("Made")
logger = logging.getLogger(__name__)

# Pauses before a rank that waits for its host's others sleeps: 15 to 100 us, by CPU; waking takes about 10 us.
WAITING_SPINS = 2000

_BUS_DELAY_PER_RANK_S = 2.0
_LONGEST_BUS_DELAY_S = 5.0
# MPICH's UCX crashes in a rank whose peer on another host was killed, before the watchdog has said who that was.
_LAST_WORDS_S = 1.0


def agreed(world: World, phase: str, make: Callable[[], Made]) -> Made:
    """Make something on every rank, or fail on all of them; collective.

    Raises:
        AgreedError: `make` raised a planned error on some rank.
    """
    made: list[Made] = []
    with world.together(phase):
        made.append(make())
    return made[0]


def open_exchange(world: World, spin: bool, environ: Mapping[str, str], wire: str = "exact") -> Exchange:
    """Through shared memory inside each host where all hosts allow it, else by MPI alone; collective.

    Args:
        world: All ranks.
        spin: Whether waiting ranks of this host may spin (`parallel.cores.may_spin`).
        environ: DIST_MOE_SHARED_MEMORY=0 asks for no shared memory; rank 0's DIST_MOE_MPI_SUM=1 for MPI's own sum
            between hosts.
        wire: How sums travel between hosts: exact, bf16 or q8.

    Raises:
        AgreedError: Rounded sums are wanted of MPI.
    """
    by_mpi = world.gather_texts(environ.get("DIST_MOE_MPI_SUM", ""))[0] == "1"
    if by_mpi and wire != "exact":
        world.agree(UsageError(f"--wire {wire}: MPI's own sum cannot round, leave DIST_MOE_MPI_SUM=1 out"), "start")
    node = _open_node_memory(world, spin, environ) if world.nodes < world.size else None
    if world.nodes == 1:
        return Exchange(world) if node is None else NodeExchange(world, node)
    assert world.comm is not None
    assert world.mpi is not None
    speaks = node is None or world.local_rank == 0
    speakers = world.comm.Split(0 if speaks else world.mpi.UNDEFINED, world.rank)
    links = HostExchange(speakers, world.mpi, world.progress, spin) if speaks else None
    costs = _agreed_costs(world, links)
    hosts = None
    if links is not None and not by_mpi:
        partial = SumsCodec(WireFormat[wire.upper()])
        hosts = HostSums(links, partial, partial if partial.rounds else SumsCodec(WireFormat.F32), costs)
    exchange = Exchange(world, hosts) if node is None else NodeExchange(world, node, speakers, hosts)
    exchange.links, exchange.link_costs = links, costs
    return exchange


def log_links(exchange: Exchange, wire: str, layers: int, model_dim: int) -> None:
    """Log what a decoded token's sums between hosts will cost, and on rank 0 warn where they are rounded.

    Args:
        exchange: Of the job.
        wire: How sums travel between hosts.
        layers: Of the model, with two sums each.
        model_dim: Values of a sum.
    """
    if exchange.link_costs is None or not exchange.world.is_leader:
        return
    if wire != "exact":
        logger.warning("--wire %s: sums between hosts are rounded, so the result depends on the number of hosts", wire)
    costs, hosts = exchange.link_costs, exchange.hosts
    sum_s = costs.seconds(2, 8 * model_dim) if hosts is None else hosts.expected_s(model_dim)
    link = (costs.latency_s * 1e6, costs.bytes_per_s * 1e-6, 2e3 * layers * sum_s)
    logger.info("between hosts: latency %.0f us, %.0f MB/s; expected exchange %.2f ms per token", *link)


def _agreed_costs(world: World, links: HostExchange | None) -> LinkCosts:
    """What rank 0 measured, on all ranks; collective."""
    costs = DEFAULT_COSTS if links is None else probe_links(links)
    latency_s, bytes_per_s = json.loads(world.gather_texts(json.dumps([costs.latency_s, costs.bytes_per_s]))[0])
    return LinkCosts(latency_s, bytes_per_s)


def _open_node_memory(world: World, spin: bool, environ: Mapping[str, str]) -> NodeMemory | None:
    """This host's shared memory, or None on all hosts where one has none; collective."""
    first = world.node_of_rank.index(world.node)
    name = f"dist-moe-{world.gather_texts(secrets.token_hex(8))[first]}"
    node, path, failure = None, "", "off" if environ.get("DIST_MOE_SHARED_MEMORY") == "0" else ""
    for turn in ("create", "open"):
        if not failure and (world.local_rank == 0) == (turn == "create"):
            try:
                spins = WAITING_SPINS if spin else 0
                node = NodeMemory(name, world.local_rank, world.local_size, spins, path)
            except EnvironmentMismatch as error:
                failure = str(error)
        path = world.gather_texts(node.path if node else "")[first]
    failures = [text for text in world.gather_texts(failure) if text]
    if node is not None and world.local_rank == 0:
        node.close_file()
    if failures or node is None:
        logger.info("ranks of one host exchange by MPI, not through shared memory: %s", failures[0])
        return None
    return node


def name_bus_errors(world: World, channel: int | None) -> None:
    """When a mapped weight file shrinks or cannot be read, end the job with a line that names rank, file and unit.

    Args:
        world: All ranks.
        channel: Where the launcher takes an abort command, or None (`parallel.mpi.abort_channel`).
    """
    place = "" if world.size == 1 else f"rank {world.rank} on {world.hostname}: "
    # Ranks of a host meet the same fault: the first prints and ends the others.
    delay_s = min(_BUS_DELAY_PER_RANK_S * world.rank, _LONGEST_BUS_DELAY_S)
    catch_bus_errors(f"dist-moe: error: {place}", delay_s, StoreError.exit_code, channel)
    if world.size > 1:
        linger_after_crash(_LAST_WORDS_S)
