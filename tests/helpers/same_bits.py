"""Run every combination that must not change a bit, on the ranks that mpirun started; rank 0 prints the hashes.

    mpirun -n N python same_bits.py STORES [--quick]

STORES holds one store per (format, nodes): `q4-1`, `q4-3`, ... A hash covers the logits of every position.
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

from dist_moe.engine.startup import open_exchange
from dist_moe.engine.worker import Worker
from dist_moe.kernels import NO_FAULT, Kernels, KvFormat, isa_levels
from dist_moe.model.step import Slice, Step
from dist_moe.model.transformer import Transformer
from dist_moe.parallel.cores import may_spin
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.plan import EXPERT_LAYOUTS, plan_job
from dist_moe.parallel.world import World
from dist_moe.store.reader import Store
from helpers.tiny_model import random_ids

TOKENS = 67  # crosses the border of a 64-position block
CHUNKS = (1, 7, TOKENS)
NODES = (1, 3, 4)
SEQUENCE = 5  # the KV cache's name of the sequence that is hashed


def steps(chunk: int, in_batch: bool, vocabulary: int) -> Iterator[Step]:
    """The steps that feed the sequence, alone or among two others of other lengths and chunks."""
    ids = random_ids(TOKENS, vocabulary)
    others = [(1, random_ids(41, vocabulary, 8), 3), (9, random_ids(90, vocabulary, 9), 11)] if in_batch else []
    for number, first in enumerate(range(0, TOKENS, chunk)):
        slices, before = [], 0
        for name, other_ids, other_chunk in others:
            at = number * other_chunk
            if at < len(other_ids):
                slices.append(Slice(name, at, other_ids[at : at + other_chunk]))
        before = sum(len(part.ids) for part in slices)
        own = Slice(SEQUENCE, first, ids[first : first + chunk])
        rows = tuple(range(before, before + len(own.ids)))
        yield Step((*slices, own), rows, (1.0,) * len(rows), True, vocabulary)


def logits_hash(worker: Worker, chunk: int, in_batch: bool, vocabulary: int, partitioned: bool = False) -> str:
    """SHA-256 over the f32 logits of every position, on rank 0; all steps partitioned by tokens, or none."""
    digest = hashlib.sha256()
    for step in steps(chunk, in_batch, vocabulary):
        step = replace(step, partitioned=partitioned)
        result = worker.run(step, lambda rows_NV: digest.update(np.ascontiguousarray(rows_NV).tobytes()))
        assert result is None or (result.fault_T == NO_FAULT).all()
    return digest.hexdigest()


def run_store(world: World, exchange: Exchange, store: Store, kernels: Kernels, layout: str, kv: KvFormat) -> Worker:
    """A fresh model on all ranks."""
    job = plan_job(store.config, store.manifest.group_size, layout, node_of_rank=world.node_of_rank)
    return Worker(Transformer(store, job, exchange, kernels, kv, 256), exchange)


def main() -> None:
    """Print {format/kv: {combination: hash}}, and every rank's level where they are mixed, as JSON on rank 0."""
    world = World.start(detect_launcher(os.environ))
    exchange = open_exchange(world, may_spin(world, 2, os.environ), os.environ)
    hashes: dict[str, dict[str, str]] = {}
    levels = isa_levels()
    stores = Path(sys.argv[1])
    all_kernels = {
        "1 thread": Kernels(1),
        "2 threads": Kernels(2),
        "mixed levels": Kernels(1, levels[world.rank % len(levels)]),
    }
    formats = sorted({path.name.split("-")[0] for path in stores.iterdir()})
    for weights, kv, nodes in itertools.product(formats, KvFormat, NODES):
        if weights != "q4" and (nodes != 1 or kv != KvFormat.F16):
            continue  # the other formats share all code but the matrix kernels
        store = Store.open(stores / f"{weights}-{nodes}")
        found = hashes.setdefault(f"{weights}/{kv.label}", {})
        for layout, (name, kernels) in itertools.product(EXPERT_LAYOUTS, all_kernels.items()):
            for chunk, in_batch in itertools.product(CHUNKS, (False, True)):
                if name == "mixed levels" and chunk == 1:
                    continue
                worker = run_store(world, exchange, store, kernels, layout, kv)
                place = "in a batch" if in_batch else "alone"
                combination = f"{nodes} nodes, {layout}, {name}, chunk {chunk}, {place}"
                found[combination] = logits_hash(worker, chunk, in_batch, store.config.vocabulary)
    mixed = world.gather_texts(all_kernels["mixed levels"].isa)
    if world.is_leader:
        print(json.dumps({"hashes": hashes, "mixed levels": mixed}))
    world.finalize()


if __name__ == "__main__":
    main()
