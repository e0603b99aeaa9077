"""The ledger over real hosts: bytes against what came over the cables, clocks of hosts, a lane per rank."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.chrome_trace import read_chrome_trace
from helpers.cluster import Cluster

pytestmark = pytest.mark.cluster

Hosts = Callable[[int], Cluster]
Stores = Callable[[int], Path]
RUN = (sys.executable, "-m", "dist_moe", "run", "--temperature", "0", "--ignore-eos", "--threads", "1")
ROOT = Path(__file__).resolve().parents[1]
LAYERS = 4  # of the demo model


@pytest.mark.parametrize("exchange", ["allreduce", "alltoall"])
def test_bytes_are_those_that_came_over_the_cables(exchange: str, hosts: Hosts, demo_stores: Stores) -> None:
    cluster = hosts(2)
    store = cluster.give(demo_stores(2), {0: [1], 1: [2]})
    done = cluster.mpirun((1, 2), sys.executable, ROOT / "helpers" / "hosts_ledger.py", store, exchange)
    assert done.code == 0, done.output
    found = json.loads(done.stdout)
    # Headers of Ethernet, IP, TCP and MPI, and acknowledgements come on top.
    assert found["noted"] <= found["carried"] <= 1.25 * found["noted"], found


def test_clocks_are_compared_and_each_rank_has_its_lane(hosts: Hosts, demo_stores: Stores) -> None:
    cluster = hosts(2)
    store = cluster.give(demo_stores(2), {0: [1], 1: [2]})
    path = cluster.disk / "trace.json"
    done = cluster.mpirun((1, 2), *RUN, "-p", "Once", "-n", "8", "--stats", "--trace", path, "-m", store)
    assert done.code == 0, done.output
    (error,) = re.findall(r"the hosts' clocks are compared to \+-(\d+) us", done.stderr)
    assert int(error) > 0
    assert re.search(r"straggling .* over 3 ranks \d\.\d\d, over 2 hosts \d\.\d\d;", done.stderr), done.stderr
    trace = read_chrome_trace(cluster.disk_of(0) / "trace.json")
    assert trace.names == {0: "rank 0 on host0", 1: "rank 1 on host1", 2: "rank 2 on host1"}
    steps = {rank: [event for event in events if event.category == "step"] for rank, events in trace.events.items()}
    for rank, own in steps.items():
        assert [step.name for step in own] == [f"step {number}" for number in range(8)]
        for step, leaders in zip(own, steps[0], strict=True):
            assert len(step.named("sums")) == 2 * LAYERS
            # These hosts are one machine, whose clock they share: a step of rank 0 ends after its others began.
            assert step.begin_ns < leaders.end_ns + 2000 * int(error), (rank, step.name)
