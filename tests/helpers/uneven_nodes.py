"""Run a model on ranks of several nodes that have other files each; rank 0 prints what must be the same everywhere.

    mpirun -n N python uneven_nodes.py STORES

STORES holds a directory for each set of shards that some node has, such as `0-2` with the first and the third of four.
Logits, candidates, and K and V as they are saved and restored are hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dist_moe.engine.start.inventory import plan_from_inventory, take_inventory
from dist_moe.engine.start.startup import open_exchange
from dist_moe.engine.steps.worker import Worker
from dist_moe.kernels import Kernels, KvFormat
from dist_moe.model.step import Step
from dist_moe.model.transformer import Transformer
from dist_moe.parallel.cores import may_spin
from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.world import World
from dist_moe.store.reader import Store
from helpers.nodes import on_nodes
from helpers.same_bits import SEQUENCE, TOKENS, logits_hash, steps
from helpers.start_record import RECORD

CHUNK = 7
RESTORED = 77  # the name of a sequence that gets the K and V of another

# Layout of experts, and whether each token's residual is on one rank alone.
WAYS = (("auto", False), ("auto", True), ("whole", False), ("sliced", False))

# By number of ranks: the node of each rank, and the shards of each node.
CASES: dict[int, list[tuple[tuple[int, ...], tuple[str, ...]]]] = {
    1: [((0,), ("0-1-2-3",))],
    2: [
        ((0, 1), ("0-2", "1-3")),
        ((0, 1), ("1-2-3", "0")),
        ((0, 1), ("0-1-2-3", "1-2")),
        ((0, 1), ("3", "0-1-2-3")),
    ],
    3: [
        ((0, 1, 1), ("0-2", "1-3")),
        ((0, 1, 0), ("0", "1-2-3")),
        ((0, 1, 2), ("0-1", "1-2", "2-3")),
        ((0, 1, 1), ("0-1-2-3", "0-1-2-3")),
    ],
    6: [
        ((0, 0, 0, 0, 0, 1), ("0", "1-2-3")),
        ((0, 1, 2, 3, 2, 0), ("3", "1", "0", "2")),
        ((0, 1, 1, 2, 2, 2), ("0-1-2-3", "1-2", "2-3")),
    ],
    10: [((0, 0, 0, 0, 1, 1, 1, 1, 1, 1), ("0-1-2-3", "0-1-2-3")), ((0, 1, 2, 3) * 2 + (0, 0), ("0", "1", "2", "3"))],
}


def kv_hash(worker: Worker, sequence: int, leads: bool) -> tuple[str, list[np.ndarray]]:
    """SHA-256 over what a saved sequence consists of, and its rows, on rank 0."""
    digest, kept = hashlib.sha256(), []

    def take(rows: np.ndarray) -> None:
        digest.update(np.ascontiguousarray(rows).tobytes())
        kept.append(rows.copy())

    worker.kv.gather(sequence, TOKENS, take if leads else None)
    return digest.hexdigest(), kept


def candidates_hash(worker: Worker, vocabulary: int) -> str:
    """SHA-256 over the candidates and block sums of every position, on rank 0."""
    digest = hashlib.sha256()
    for step in steps(CHUNK, False, vocabulary):
        result = worker.run(step)
        for found in result.candidates if result is not None else ():
            for array in (found.ids_C, found.logits_C, found.max_B, found.sum_B):
                digest.update(np.ascontiguousarray(array).tobytes())
        for row in result.full_logits if result is not None else ():
            digest.update(row.tobytes())
    return digest.hexdigest()


def run_case(
    world: World, kernels: Kernels, stores: Path, shards: Sequence[str], layout: str, partitioned: bool
) -> dict[str, str]:
    """The hashes of one case and the layout that was taken."""
    store = Store.open(stores / shards[world.node], with_text=False)
    records = [RECORD] * world.size
    job = plan_from_inventory(world, store.manifest, take_inventory(world, store, records), layout)
    exchange = open_exchange(world, may_spin(world, 1, os.environ), {})
    worker = Worker(Transformer(store, job, exchange, kernels, KvFormat.F16, 256), exchange)
    vocabulary = store.config.vocabulary

    def fed(partitioned: bool) -> Iterable[Step]:
        return (replace(step, partitioned=partitioned) for step in steps(CHUNK, True, vocabulary))

    found = {"logits": logits_hash(worker, fed(partitioned))}
    found["kv"], rows = kv_hash(worker, SEQUENCE, world.is_leader)
    worker.kv.scatter(RESTORED, TOKENS, (lambda layer, first, stop: rows[layer][first:stop]) if rows else None)
    found["restored kv"] = kv_hash(worker, RESTORED, world.is_leader)[0]
    found["candidates"] = candidates_hash(worker, vocabulary)
    found["logits by alltoall"] = logits_hash(worker, fed(True))
    return {**found, "layout": job.layout}


def main() -> None:
    """Print {case: hashes} as JSON on rank 0."""
    world = World.start(detect_launcher(os.environ))
    stores, kernels = Path(sys.argv[1]), Kernels(1)
    found = {}
    for node_of_rank, shards in CASES[world.size]:
        for layout, partitioned in WAYS:
            name = f"{node_of_rank} {shards} {layout}{', tokens partitioned' if partitioned else ''}"
            found[name] = run_case(on_nodes(world, node_of_rank), kernels, stores, shards, layout, partitioned)
    if world.is_leader:
        print(json.dumps(found))
    world.finalize()


if __name__ == "__main__":
    main()
