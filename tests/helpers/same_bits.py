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
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dist_moe.engine.start.startup import open_exchange
from dist_moe.engine.steps.worker import Worker
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
BEFORE_BORDER = 60
NODES = (1, 3, 4)
SEQUENCE = 5  # the KV cache's name of the sequence that is hashed


def steps(chunk: int, in_batch: bool, vocabulary: int, first_chunk: int = 0, at_name: int = 0) -> Iterator[Step]:
    """The steps that feed the sequence, alone or among two others of other lengths and chunks.

    Args:
        chunk: Tokens of a step.
        in_batch: Whether there are others.
        vocabulary: Of the model.
        first_chunk: Tokens of the first step, if they are others.
        at_name: Added to the names of the sequences.
    """
    ids = random_ids(TOKENS, vocabulary)
    others = [(1, random_ids(41, vocabulary, 8), 3), (9, random_ids(90, vocabulary, 9), 11)] if in_batch else []
    begins = [0, *range(first_chunk or chunk, TOKENS, chunk)]
    for number, (first, stop) in enumerate(zip(begins, [*begins[1:], TOKENS], strict=True)):
        slices, before = [], 0
        for name, other_ids, other_chunk in others:
            at = number * other_chunk
            if at < len(other_ids):
                slices.append(Slice(at_name + name, at, other_ids[at : at + other_chunk]))
        before = sum(len(part.ids) for part in slices)
        own = Slice(at_name + SEQUENCE, first, ids[first:stop])
        rows = tuple(range(before, before + len(own.ids)))
        yield Step((*slices, own), rows, (1.0,) * len(rows), True, vocabulary)


def logits_hash(worker: Worker, steps: Iterable[Step]) -> str:
    """SHA-256 over the f32 logits of every position, on rank 0."""
    digest = hashlib.sha256()
    for step in steps:
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
            worker = run_store(world, exchange, store, kernels, layout, kv)
            for turn, (chunk, in_batch) in enumerate(itertools.product(CHUNKS, (False, True))):
                if name == "mixed levels" and chunk == 1:
                    continue
                # Single tokens from the begin once per format, layout and batch; else those at the block's border.
                first_chunk = 0 if chunk > 1 or (nodes == 1 and name == "1 thread") else BEFORE_BORDER
                place = "in a batch" if in_batch else "alone"
                combination = f"{nodes} nodes, {layout}, {name}, chunk {chunk}, {place}"
                fed = steps(chunk, in_batch, store.config.vocabulary, first_chunk, 10 * turn)
                found[combination] = logits_hash(worker, fed)
    mixed = world.gather_texts(all_kernels["mixed levels"].isa)
    if world.is_leader:
        print(json.dumps({"hashes": hashes, "mixed levels": mixed}))
    world.finalize()


if __name__ == "__main__":
    main()
