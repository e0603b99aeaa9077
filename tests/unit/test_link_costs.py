"""What is made of the start-up probe's times: latency and rate of links, and in how many phases sums are added up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dist_moe.engine.options import EngineOptions
from dist_moe.kernels import SumsCodec, WireFormat
from dist_moe.parallel.cost import sum_traffic
from dist_moe.parallel.host_sums import FEWEST_SUMS, MOST_SUMS, HostSums
from dist_moe.parallel.probe import LinkCosts, fit_costs

SIZES = (2048, 65536, 1 << 20)
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
    found = fit_costs({size: costs.seconds(1, (hosts - 1) * size) for size in SIZES}, hosts)
    assert found.latency_s == pytest.approx(costs.latency_s)
    assert found.bytes_per_s == pytest.approx(costs.bytes_per_s)


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
