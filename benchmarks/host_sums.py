"""Exact sums between hosts: ours in one phase and two, rounded ones, and MPI_Allreduce of int64 beside.

    mpirun -f hosts -n 2 python benchmarks/host_sums.py [--tokens 1,8,64,512] [--seconds 1] [--json]

Rank 0 prints microseconds per sum of tokens of 2048 values, the bytes that it sent for one, and what the start-up probe
expects (bytes / rate + latencies). The values are of a layer's size, so that packing finds 4 or 5 bytes in each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import numpy as np

from dist_moe.engine.start.startup import open_exchange
from dist_moe.parallel.cores import may_spin
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.world import World

D = 2048
LEAST_CALLS = 3


def time_calls(world: World, exchange: Exchange, call: Callable[[], None], seconds: float) -> float:
    """Median seconds of a call on rank 0; collective."""
    sample: list[float] = []
    go_on = np.ones(1, np.int64)
    stop_s = time.perf_counter() + seconds
    while go_on[0]:
        for _ in range(LEAST_CALLS if len(sample) < 30 else 10):
            started_s = time.perf_counter()
            call()
            sample.append(time.perf_counter() - started_s)
        go_on[0] = time.perf_counter() < stop_s
        exchange.broadcast(go_on)
    return statistics.median(sample)


def measure_sum(world: World, exchange: Exchange, values: np.ndarray, seconds: float) -> dict[str, float]:
    """One way of one size; collective."""
    sums = values.copy()
    before_bytes = exchange.ledger.wire_bytes
    exchange.sum_exact(sums)
    sent_bytes = exchange.ledger.wire_bytes - before_bytes

    def call() -> None:
        np.copyto(sums, values)
        exchange.sum_exact(sums)

    copying_s = time_calls(world, exchange, lambda: np.copyto(sums, values), 0.05)
    taken_s = time_calls(world, exchange, call, seconds) - copying_s
    return {"us": 1e6 * taken_s, "sent_bytes": float(sent_bytes)}


def ways_of(world: World, spin: bool) -> dict[str, Exchange]:
    """The exchanges to compare; collective."""
    ways = {wire: open_exchange(world, spin, os.environ, wire) for wire in ("exact", "bf16", "q8")}
    for name, one_phase in (("one phase", True), ("two phases", False)):
        ways[name] = open_exchange(world, spin, os.environ)
        hosts = ways[name].hosts
        if hosts is not None:
            hosts.one_phase = one_phase
    ways["MPI_Allreduce"] = open_exchange(world, spin, {"DIST_MOE_MPI_SUM": "1"})
    return ways


def main() -> None:
    """Measure on the ranks that mpirun started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,8,64,512", help="tokens of a sum (default 1,8,64,512)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure (default 1)")
    parser.add_argument("--ways", default="", help="only these, as the table names them, with commas between")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    arguments = parser.parse_args()
    world = World.start(detect_launcher(os.environ))
    if world.nodes < 2:
        parser.error("this measures several hosts: start it with mpirun on two or more")
    ways = ways_of(world, may_spin(world, 1, os.environ))
    chosen = arguments.ways.split(",") if arguments.ways else list(ways)
    costs = ways["exact"].link_costs
    assert costs is not None
    if world.is_leader:
        print(f"# {world.nodes} hosts, {world.size} ranks, {world.library}, {costs}", flush=True)
    for tokens in map(int, arguments.tokens.split(",")):
        values = (np.random.default_rng(world.rank).normal(0, 0.05, tokens * D) * 2**32).astype(np.int64)
        for name in chosen:
            found = measure_sum(world, ways[name], values, arguments.seconds)
            hosts = ways[name].hosts
            phases = 2 if hosts is None or not hosts.is_one_phase(values.size) else 1
            expected_us = 1e6 * costs.seconds(phases, found["sent_bytes"])
            if world.is_leader and arguments.json:
                print(json.dumps({"tokens": tokens, "way": name, "expected_us": expected_us} | found), flush=True)
            elif world.is_leader:
                print(
                    f"{tokens:5} tokens  {name:14} {found['us']:10.1f} us  {found['sent_bytes']:10.0f} B  "
                    f"expected {expected_us:10.1f} us",
                    flush=True,
                )
    world.finalize()


if __name__ == "__main__":
    main()
