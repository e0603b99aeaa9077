"""What is made of the start-up probe's times: latency and rate of links, and in how many phases sums are added up."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dist_moe.engine.start.options import EngineOptions
from dist_moe.kernels import SumsCodec, WireFormat
from dist_moe.parallel.cost import LinkCosts, sum_traffic
from dist_moe.parallel.host_sums import FEWEST_SUMS, MOST_SUMS, HostSums
from dist_moe.parallel.probe import SIZES_BYTES, fit_costs, probe_links
from dist_moe.parallel.progress import Progress

ETHERNET = LinkCosts(50e-6, 0.117e9)
INFINIBAND = LinkCosts(2e-6, 11e9)


def host_sums(hosts: int, costs: LinkCosts, wire: WireFormat = WireFormat.EXACT) -> HostSums:
    """Of one of so many hosts, which has no links."""
    links: Any = SimpleNamespace(hosts=hosts, host=0)
    partial = SumsCodec(wire)
    return HostSums(links, partial, partial if partial.rounds else SumsCodec(WireFormat.F32), costs)


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("costs", [ETHERNET, INFINIBAND])
def test_times_of_a_plain_link_give_its_latency_and_rate(costs: LinkCosts, hosts: int) -> None:
    found = fit_costs({size: costs.seconds(1, (hosts - 1) * size) for size in SIZES_BYTES}, hosts)
    assert found.latency_s == pytest.approx(costs.latency_s)
    assert found.bytes_per_s == pytest.approx(costs.bytes_per_s)


@pytest.mark.parametrize("size", SIZES_BYTES)
def test_a_size_that_took_a_tenth_longer_moves_the_line_by_less(size: int) -> None:
    found = fit_costs({each: ETHERNET.seconds(1, each) * (1.1 if each == size else 1) for each in SIZES_BYTES}, 2)
    assert 0.9 < ETHERNET.bytes_per_s / found.bytes_per_s < 1.1
    assert 0.75 < found.latency_s / ETHERNET.latency_s < 1.25
    if size == 65536:  # neither end of the line
        assert found.bytes_per_s != pytest.approx(ETHERNET.bytes_per_s)


def test_a_burst_that_a_shaper_lets_through_does_not_count_as_the_rate() -> None:
    found = fit_costs({2048: 3e-5, 65536: 3e-4, 1 << 20: ETHERNET.seconds(1, 1 << 20)}, 2)
    assert found.bytes_per_s == pytest.approx(ETHERNET.bytes_per_s, rel=0.01)
    assert found.latency_s >= 1.5e-5


class Links:
    """Two hosts whose messages take no time; every receive has a place that no other one under way has."""

    hosts, host = 2, 0

    def __init__(self) -> None:
        self.progress = Progress()
        self.under_way: list[np.ndarray] = []
        self.most = 0

    def post(self, outgoing_N: list[np.ndarray], incoming_N: list[np.ndarray]) -> Links:
        assert not any(np.shares_memory(incoming_N[1], other) for other in self.under_way)
        assert incoming_N[1].size >= outgoing_N[1].size
        self.under_way.append(incoming_N[1])
        self.most = max(self.most, len(self.under_way))
        return self

    def finish(self) -> Iterator[tuple[int, int]]:
        yield 1, self.under_way.pop(0).size

    def swap(self, outgoing_N: list[np.ndarray], incoming_N: list[np.ndarray]) -> list[int]:
        incoming_N[1][:] = outgoing_N[0]
        return [0, 8]


def test_no_two_messages_of_the_probe_are_received_in_one_place() -> None:
    links: Any = Links()
    probe_links(links)
    assert 1 < links.most < (1 << 20) / 16384
    assert links.under_way == []


@pytest.mark.parametrize(
    "seconds_of", [{2048: 0.5}, {2048: 3e-4, 65536: 2e-4}, {2048: 1e-5, 65536: 1e-2}], ids=["slow", "noise", "burst"]
)
def test_odd_times_give_costs_above_nothing(seconds_of: dict[int, float]) -> None:
    costs = fit_costs(seconds_of, 2)
    assert costs.latency_s > 0
    assert costs.bytes_per_s > 0


def test_one_phase_is_for_two_hosts_and_for_small_sums() -> None:
    assert host_sums(2, ETHERNET).is_one_phase(2048 * 512)
    assert not host_sums(4, ETHERNET).is_one_phase(2048)
    assert host_sums(4, LinkCosts(1e-3, 0.117e9)).is_one_phase(2048)
    assert not host_sums(4, LinkCosts(1e-3, 0.117e9)).is_one_phase(2048 * 512)
    assert host_sums(3, INFINIBAND).is_one_phase(256)


@pytest.mark.parametrize("link", [ETHERNET, INFINIBAND, LinkCosts(1e-3, 0.117e9)])
@pytest.mark.parametrize("hosts", [2, 3, 4, 8])
def test_the_cost_model_counts_the_phases_that_sums_take(hosts: int, link: LinkCosts) -> None:
    for count in (32, 2048, 2048 * 8, 2048 * 512):
        phases = 1 if host_sums(hosts, link).is_one_phase(count) else 2
        assert sum_traffic(count, hosts, link).phases == phases, count


@pytest.mark.parametrize("wire", [WireFormat.BF16, WireFormat.Q8])
@pytest.mark.parametrize("hosts", [2, 3, 8])
def test_what_rounding_gives_does_not_hang_on_measured_costs(hosts: int, wire: WireFormat) -> None:
    for count in (1, 2048, 2048 * 8, 2048 * 512):
        choices = {host_sums(hosts, costs, wire).is_one_phase(count) for costs in (ETHERNET, INFINIBAND)}
        assert len(choices) == 1
    assert EngineOptions(8, wire=wire.label).step_exchange == "allreduce"
    assert EngineOptions(8, wire=wire.label, exchange="alltoall").step_exchange == "alltoall"
    assert EngineOptions(8).step_exchange == "auto"


def test_the_expected_time_is_latencies_and_bytes_by_rate() -> None:
    assert host_sums(2, ETHERNET).expected_s(2048) == pytest.approx(50e-6 + 2048 * 4.5 / 0.117e9)
    assert host_sums(4, ETHERNET).expected_s(2048) == pytest.approx(100e-6 + 2048 * 3 * 8.5 / 4 / 0.117e9)


def test_messages_are_as_long_as_the_rate_asks_for() -> None:
    assert host_sums(2, LinkCosts(1e-3, 1e6)).message_sums == FEWEST_SUMS
    assert host_sums(2, INFINIBAND).message_sums == MOST_SUMS
    assert FEWEST_SUMS < host_sums(2, LinkCosts(1e-5, 3e8)).message_sums < MOST_SUMS
