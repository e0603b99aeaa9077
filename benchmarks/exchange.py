"""What the exchanges of one host cost: exact sums against MPI_Allreduce, idle ranks, and the start of a step.

    mpirun -n 4 python benchmarks/exchange.py [--bytes 16384] [--seconds 2] [--idle 10] [--json]

Rank 0 prints. Times are of rank 0; the ranks exchange without a pause. DIST_MOE_YIELD=1 forbids spinning.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dist_moe.engine.start.startup import open_exchange
from dist_moe.parallel.cores import may_spin
from dist_moe.parallel.exchange import HEADER_WORDS, Exchange
from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.world import World

BATCH = 50  # sums between two looks at the clock that all ranks agree on
CONTINUE, STOP = 1, 0


@dataclass(frozen=True)
class Spread:
    """Quantiles of a sample, all in one unit."""

    count: int
    p10: float
    median: float
    p90: float
    p95: float
    largest: float

    @classmethod
    def of(cls, sample: list[float], scale: float) -> Spread:
        """The quantiles of seconds, times a scale."""
        ordered = sorted(value * scale for value in sample)
        at = [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.1, 0.9, 0.95)]
        return cls(len(ordered), at[0], statistics.median(ordered), at[1], at[2], ordered[-1])


def time_calls(world: World, exchange: Exchange, call: Callable[[], None], seconds: float) -> list[float]:
    """Seconds of each call on rank 0, in batches until rank 0's time is up; collective."""
    sample: list[float] = []
    go_on = np.array([CONTINUE], np.int64)
    stop_s = time.perf_counter() + seconds
    world.barrier()
    while go_on[0] == CONTINUE:
        for _ in range(BATCH):
            started_s = time.perf_counter()
            call()
            sample.append(time.perf_counter() - started_s)
        go_on[0] = CONTINUE if time.perf_counter() < stop_s else STOP
        exchange.broadcast(go_on)
    return sample[BATCH:] or sample


def measure_sums(world: World, exchange: Exchange, count: int, seconds: float) -> Spread:
    """Microseconds of one exact sum of `count` int64 over all ranks."""
    sums = np.zeros(count, np.int64)
    return Spread.of(time_calls(world, exchange, lambda: exchange.sum_exact(sums), seconds), 1e6)


def measure_idle(world: World, exchange: Exchange, seconds: float) -> list[float]:
    """Percent of a core that each rank uses while it waits for the next step, by rank; collective."""
    world.barrier()
    cpu_s, started_s = time.process_time(), time.perf_counter()
    _wait_idle(world, exchange, seconds)
    used = 100 * (time.process_time() - cpu_s) / (time.perf_counter() - started_s)
    return [float(text) for text in world.gather_texts(repr(used))]


def _wait_idle(world: World, exchange: Exchange, seconds: float) -> None:
    header = np.zeros(HEADER_WORDS, np.int64)
    if world.is_leader:
        time.sleep(seconds)
        exchange.post_step(header)
    else:
        exchange.wait_step(header)


def measure_step_starts(world: World, exchange: Exchange, steps: int) -> Spread:
    """Milliseconds from rank 0's call to the follower's waking, over all followers and pauses of 0.3 to 30 ms.

    Collective. The clock is CLOCK_MONOTONIC, which the ranks of one host share.
    """
    header, waits = np.zeros(HEADER_WORDS, np.int64), []
    dice = random.Random(1)
    for _ in range(steps):
        if world.is_leader:
            time.sleep(3e-4 * 100 ** dice.random())
            header[0] = time.monotonic_ns()
            exchange.post_step(header)
        else:
            exchange.wait_step(header)
            waits.append((time.monotonic_ns() - int(header[0])) * 1e-9)
    everyone = [wait for text in world.gather_texts(json.dumps(waits)) for wait in json.loads(text)]
    return Spread.of(everyone, 1e3)


def measure(world: World, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures by name; collective."""
    spin = may_spin(world, 1, os.environ)
    ours = open_exchange(world, spin, os.environ)
    mpi = open_exchange(world, spin, {"DIST_MOE_SHARED_MEMORY": "0"})
    count = arguments.bytes // 8
    return {
        "ranks": world.size,
        "cores": len(os.sched_getaffinity(0)),
        "library": world.library,
        "path": type(ours).__name__,
        "spin": spin,
        "bytes": arguments.bytes,
        "ours_us": asdict(measure_sums(world, ours, count, arguments.seconds)),
        "mpi_us": asdict(measure_sums(world, mpi, count, arguments.seconds)),
        "step_start_ms": asdict(measure_step_starts(world, ours, arguments.steps)),
        "idle_percent": measure_idle(world, ours, arguments.idle) if arguments.idle else [],
    }


def print_table(found: dict[str, Any]) -> None:
    """The figures as text."""
    print(f"{found['ranks']} ranks, {found['cores']} cores, {found['library']}, {found['path']}, spin {found['spin']}")
    print(f"{'':32}{'median':>9}{'p10':>9}{'p90':>9}{'p95':>9}{'worst':>9}{'n':>9}")
    rows = (("ours_us", "exact sum, ours [us]"), ("mpi_us", "MPI_Allreduce [us]"), ("step_start_ms", "step start [ms]"))
    for key, title in rows:
        spread = Spread(**found[key])
        figures = (spread.median, spread.p10, spread.p90, spread.p95, spread.largest)
        print(f"{title:32}" + "".join(f"{value:9.2f}" for value in figures) + f"{spread.count:9}")
    if found["idle_percent"]:
        print(f"{'idle [% of a core, by rank]':32}" + "".join(f"{value:9.2f}" for value in found["idle_percent"]))


def main() -> None:
    """Measure on the ranks that mpirun started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=16384, help="of a sum (default 16384)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each kind of sum (default 2)")
    parser.add_argument("--steps", type=int, default=200, help="step starts (default 200)")
    parser.add_argument("--idle", type=float, default=10.0, help="seconds of idle time, 0 for none (default 10)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    world = World.start(detect_launcher(os.environ))
    if world.nodes != 1 or world.size < 2:
        parser.error("this measures the ranks of one host: start it with mpirun -n 2 or more, on one host")
    found = measure(world, arguments)
    if world.is_leader:
        print(json.dumps(found)) if arguments.json else print_table(found)
    world.finalize()


if __name__ == "__main__":
    main()
