"""Sums and messages between hosts, every rank one; `test_ranks_at_every_size.py` runs these on several ranks.

N hosts
"""

from __future__ import annotations

import numpy as np
import pytest

from dist_moe.engine.start.startup import open_exchange
from dist_moe.errors import EnvironmentMismatch
from dist_moe.kernels import SumsCodec, WireFormat
from dist_moe.kernels.reference_sums import bf16_sums, finished_sums, q8_sums
from dist_moe.parallel.cost import LinkCosts
from dist_moe.parallel.host_exchange import HostExchange
from dist_moe.parallel.host_sums import MOST_SUMS, HostSums
from dist_moe.parallel.probe import probe_links
from dist_moe.parallel.world import World
from helpers.nodes import on_nodes

pytestmark = pytest.mark.mpi

COUNTS = (0, 1, 31, 33, 2048, 2049, 9 * MOST_SUMS + 5)
SLOW, FAST = LinkCosts(1e-4, 1e8), LinkCosts(1e-5, 1e10)


@pytest.fixture(params=[True, False], ids=["spinning", "yielding"])
def links(world: World, request: pytest.FixtureRequest) -> HostExchange:
    """A host for every rank."""
    if world.comm is None or world.size == 1:
        pytest.skip("one rank has nobody to talk to")
    if request.param and world.size > 2:
        pytest.skip("ranks that share cores may not spin")
    return HostExchange(world.comm.Dup(), world.mpi, world.progress, request.param)


def contribution(host: int, count: int, scale: float = 0.05) -> np.ndarray:
    """A host's own sums, of a layer's size."""
    return (np.random.default_rng([host, count]).normal(0, scale, count) * 2**32).astype(np.int64)


def host_sums(links: HostExchange, wire: WireFormat, phases: int, costs: LinkCosts = SLOW) -> HostSums:
    """Sums in so many phases."""
    partial = SumsCodec(wire)
    sums = HostSums(links, partial, partial if partial.rounds else SumsCodec(WireFormat.F32), costs)
    sums.one_phase = phases == 1
    return sums


def are_equal_everywhere(world: World, values: np.ndarray) -> bool:
    """Whether all ranks have the same values."""
    return len(set(world.gather_equal_bytes(values.tobytes()))) == 1


@pytest.mark.parametrize("costs", [SLOW, FAST], ids=["short messages", "long messages"])
@pytest.mark.parametrize("phases", [1, 2])
def test_exact_sums_are_used_as_the_same_numbers(
    world: World, links: HostExchange, phases: int, costs: LinkCosts
) -> None:
    summing = host_sums(links, WireFormat.EXACT, phases, costs)
    for count in COUNTS:
        sums = contribution(links.host, count)
        summing.sum(sums)
        expected = sum(contribution(host, count) for host in range(links.hosts))
        assert phases == 2 or (sums == expected).all()
        assert (finished_sums(sums) == finished_sums(expected)).all()
        assert are_equal_everywhere(world, sums)


@pytest.mark.parametrize("phases", [1, 2])
def test_a_sum_out_of_range_is_so_on_all_hosts(links: HostExchange, phases: int) -> None:
    sums = np.zeros(100, np.int64)
    sums[99] = 2**51 if links.host == links.hosts - 1 else 5
    host_sums(links, WireFormat.EXACT, phases).sum(sums)
    assert (sums >= 2**51).tolist() == [False] * 99 + [True]


@pytest.mark.parametrize("wire", [WireFormat.BF16, WireFormat.Q8])
@pytest.mark.parametrize("phases", [1, 2])
def test_rounded_sums_are_the_same_on_all_hosts(
    world: World, links: HostExchange, wire: WireFormat, phases: int
) -> None:
    rounded = bf16_sums if wire is WireFormat.BF16 else q8_sums
    for count in COUNTS:
        parts = [contribution(host, count) for host in range(links.hosts)]
        sums = parts[links.host].copy()
        host_sums(links, wire, phases).sum(sums)
        assert are_equal_everywhere(world, sums)
        expected = sum(rounded(part) for part in parts)
        if phases == 1:
            assert (sums == expected).all()
        elif count:
            assert np.abs(sums - sum(parts)).max() <= 0.02 * max(np.abs(expected).max(), 1)


def test_exact_sums_take_few_bytes(links: HostExchange) -> None:
    count = 2048 * 48
    plain_bytes = 2 * 8 * count * (links.hosts - 1) / links.hosts
    for phases in (1, 2) if links.hosts == 2 else (2,):
        before_bytes = links.sent_bytes
        host_sums(links, WireFormat.EXACT, phases).sum(contribution(links.host, count))
        assert 0 < links.sent_bytes - before_bytes <= 0.65 * plain_bytes


def test_messages_bring_their_length(links: HostExchange) -> None:
    own, N = links.host, links.hosts
    incoming_N = [np.full(100, 255, np.uint8) for _ in range(N)]
    outgoing_N = [np.full(7 * own + host, own, np.uint8) for host in range(N)]
    lengths_N = links.swap(outgoing_N, incoming_N)
    assert lengths_N == [0 if host == own else 7 * host + own for host in range(N)]
    for host in links.others:
        assert incoming_N[host].tolist() == [host] * lengths_N[host] + [255] * (100 - lengths_N[host])


def test_no_message_goes_where_none_is_expected(links: HostExchange) -> None:
    buffers = [np.full(3, links.host, np.uint8) for _ in range(links.hosts)]
    receives = [links.host > 0 and host == 0 for host in range(links.hosts)]
    sends = [links.host == 0 and host > 0 for host in range(links.hosts)]
    before_bytes = links.sent_bytes
    lengths_N = links.swap(
        [buffers[host] if sends[host] else None for host in range(links.hosts)],
        [buffers[host] if receives[host] else None for host in range(links.hosts)],
    )
    assert lengths_N == [3 * got for got in receives]
    assert links.sent_bytes - before_bytes == 3 * sum(sends)


def test_damaged_sums_are_refused(links: HostExchange) -> None:
    if links.host == 0:
        links.swap([np.full(40, 77, np.uint8)] * links.hosts, [np.empty(4096, np.uint8)] * links.hosts)
        return
    with pytest.raises(EnvironmentMismatch, match="40 bytes from another host are no 33 packed sums"):
        host_sums(links, WireFormat.EXACT, 1).sum(np.arange(33))


def test_the_probe_finds_the_same_on_all_hosts_in_bounded_time(world: World, links: HostExchange) -> None:
    costs = probe_links(links)
    assert 0 < costs.latency_s < 10
    assert 1e3 < costs.bytes_per_s < 1e13
    assert len(set(world.gather_texts(repr(costs)))) == 1


@pytest.mark.parametrize("environ", [{}, {"DIST_MOE_MPI_SUM": "1"}, {"DIST_MOE_SHARED_MEMORY": "0"}], ids=str)
def test_ranks_of_two_hosts_sum_alike(world: World, environ: dict[str, str]) -> None:
    if world.size < 2:
        pytest.skip("one rank is one host")
    half = (world.size + 1) // 2
    exchange = open_exchange(on_nodes(world, [int(rank >= half) for rank in range(world.size)]), False, environ)
    speaks = exchange.world.local_rank == 0 or "DIST_MOE_SHARED_MEMORY" in environ
    assert (exchange.hosts is not None) == (speaks and "DIST_MOE_MPI_SUM" not in environ)
    assert len(set(world.gather_texts(repr(exchange.link_costs)))) == 1
    for count in COUNTS:
        sums = contribution(world.rank, count)
        exchange.sum_exact(sums)
        expected = sum(contribution(rank, count) for rank in range(world.size))
        assert (finished_sums(sums) == finished_sums(expected)).all()
