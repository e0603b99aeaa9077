"""Run partitioned steps in every combination that must not change a bit; rank 0 prints the hashes, as same_bits.py.

    mpirun -n N python partitioned_bits.py STORES

STORES holds one store per format: `q4-1`, `f32-1`, ...
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from dist_moe.engine.start.startup import open_exchange
from dist_moe.engine.steps.worker import Worker
from dist_moe.kernels import NO_FAULT, Kernels, KvFormat
from dist_moe.parallel.cores import may_spin
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.plan import EXPERT_LAYOUTS
from dist_moe.parallel.world import World
from dist_moe.store.reader import Store
from helpers.nodes import on_two_hosts
from helpers.same_bits import TOKENS, run_store, steps

# Which steps are partitioned: all, or every other one.
MODES = {"alltoall": lambda number: True, "by turns": lambda number: number % 2 == 0}
WAYS = ("shared memory", "MPI", "two hosts")


def exchanges(world: World) -> dict[str, tuple[World, Exchange]]:
    """The same ranks as those of one host, of two, and as ranks that share no memory."""
    found = {}
    for way in WAYS:
        there = on_two_hosts(world) if way == "two hosts" else world
        environ = {**os.environ, "DIST_MOE_SHARED_MEMORY": "0" if way == "MPI" else "1"}
        found[way] = there, open_exchange(there, may_spin(world, 1, os.environ), environ)
    return found


def logits_hash(worker: Worker, mode: str, chunk: int, in_batch: bool, vocabulary: int) -> str:
    """SHA-256 over the f32 logits of every position, on rank 0."""
    digest = hashlib.sha256()
    for number, step in enumerate(steps(chunk, in_batch, vocabulary)):
        step = replace(step, partitioned=MODES[mode](number))
        result = worker.run(step, lambda rows_NV: digest.update(np.ascontiguousarray(rows_NV).tobytes()))
        assert result is None or (result.fault_T == NO_FAULT).all()
    worker.health.compare()
    return digest.hexdigest()


def combinations(name: str) -> Iterator[tuple[str, str, str, int, bool]]:
    """Way, layout, mode, chunk, in a batch: all of them for one pair of formats, a few for the others."""
    if name == "q4/f16":
        yield from itertools.product(WAYS, EXPERT_LAYOUTS, ("alltoall",), (7, TOKENS), (False, True))
        yield from itertools.product(WAYS, ("whole",), MODES, (1, 7), (False,))
    else:
        yield from itertools.product(("two hosts",), ("whole", "shared"), MODES, (7, TOKENS), (True,))


def main() -> None:
    """Print {format/kv: {combination: hash}} as JSON on rank 0."""
    world = World.start(detect_launcher(os.environ))
    ways, kernels = exchanges(world), Kernels(1)
    hashes: dict[str, dict[str, str]] = {}
    stores = Path(sys.argv[1])
    formats = sorted({path.name.split("-")[0] for path in stores.iterdir()})
    for weights, kv in itertools.product(formats, KvFormat):
        if weights != "q4" and kv != KvFormat.F16:
            continue
        store = Store.open(stores / f"{weights}-1")
        found = hashes.setdefault(f"{weights}/{kv.label}", {})
        for way, layout, mode, chunk, in_batch in combinations(f"{weights}/{kv.label}"):
            there, exchange = ways[way]
            worker = run_store(there, exchange, store, kernels, layout, kv)
            place = "in a batch" if in_batch else "alone"
            combination = f"{way}, {layout}, {mode}, chunk {chunk}, {place}"
            found[combination] = logits_hash(worker, mode, chunk, in_batch, store.config.vocabulary)
    if world.is_leader:
        print(json.dumps({"hashes": hashes}))
    world.finalize()


if __name__ == "__main__":
    main()
