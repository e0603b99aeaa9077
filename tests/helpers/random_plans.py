"""Random plans against one rank: logits, candidates and faults of sequences of which some meet a NaN or an overflow.

    mpirun -n N python random_plans.py STORES FIRST STOP

STORES holds one store per name. Each seed from FIRST to before STOP draws a store, the nodes of the ranks, the units
that each node holds (any number of copies), the nodes' speeds, a layout, how ranks reach each other, steps of several
sequences, and which of the steps are partitioned by tokens. Rank 0 prints what differs from one rank.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_moe.engine.start.startup import open_exchange
from dist_moe.engine.steps.worker import StepResult, Worker
from dist_moe.kernels import NO_FAULT, Kernels, KvFormat
from dist_moe.model.step import Slice, Step
from dist_moe.model.transformer import Transformer
from dist_moe.model_config import ModelConfig
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.holdings import Held, Holdings, everything_held
from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.plan import EXPERT_LAYOUTS, JobPlan, plan_job
from dist_moe.parallel.world import World
from dist_moe.store.reader import Store
from helpers.nodes import on_nodes

SEQUENCES = 4
MOST_ROWS = 20  # more than are computed together
WAYS = ({}, {}, {"DIST_MOE_SHARED_MEMORY": "0"}, {"DIST_MOE_MPI_SUM": "1"})


def random_nodes(rng: np.random.Generator, ranks: int) -> list[int]:
    """A node for each rank; nodes count by their lowest rank."""
    order: dict[int, int] = {}
    return [order.setdefault(node, len(order)) for node in rng.integers(0, rng.integers(1, ranks + 1), ranks).tolist()]


def random_holdings(rng: np.random.Generator, config: ModelConfig, group: int, nodes: int) -> Holdings:
    """Each unit on at least one node; KV heads where their heads are; chunks one by one, or expert by expert."""
    whole, density = everything_held(config, group, nodes), rng.choice([0.2, 0.5, 0.9])

    def some(units: int) -> Held:
        held_NU = rng.random((nodes, units)) < density
        held_NU[rng.integers(0, nodes, units), np.arange(units)] = True
        return held_NU

    heads_NH, by_expert = some(config.heads), rng.random() < 0.5
    chunks_NC = []
    for layer in range(config.layers):
        chunks, experts = whole.chunks_NC[layer].shape[1], config.layer_experts(layer)
        alike = chunks // experts if by_expert and experts > 1 else 1
        chunks_NC.append(np.repeat(some(chunks // alike), alike, axis=1))
    return Holdings(
        heads_NH=heads_NH,
        kv_heads_NG=heads_NH.reshape(nodes, config.kv_heads, -1).any(axis=2),
        vocabulary_NB=some(whole.vocabulary_NB.shape[1]),
        chunks_NC=tuple(chunks_NC),
    )


def random_steps(rng: np.random.Generator, vocabulary: int) -> Iterator[Step]:
    """Sequences of up to 150 tokens in pieces of any size."""
    ids = [rng.integers(0, vocabulary, rng.integers(1, 150)).tolist() for _ in range(SEQUENCES)]
    done = [0] * SEQUENCES
    while any(done[s] < len(ids[s]) for s in range(SEQUENCES)):
        slices = []
        for s in range(SEQUENCES):
            part = ids[s][done[s] : done[s] + int(rng.choice([0, 1, 1, 5, 60]))]
            if part:
                slices.append(Slice(s, done[s], tuple(part)))
                done[s] += len(part)
        T = sum(len(part.ids) for part in slices)
        if T:
            rows = sorted(rng.choice(T, rng.integers(0, min(T, MOST_ROWS) + 1), replace=False).tolist())
            partitioned = bool(rng.random() < 0.6)
            yield Step(tuple(slices), tuple(rows), (1.0,) * len(rows), True, vocabulary, partitioned=partitioned)


@dataclass(frozen=True)
class Seen:
    """A step and what came of it, by token or by row, of sequences without an earlier fault."""

    fault_T: npt.NDArray[np.int32]
    words_of_row: dict[int, bytes]


def watch(worker: Worker, steps: Sequence[Step]) -> list[Seen]:
    """Run the steps; on rank 0 what came of each."""
    found, broken = [], set()
    for step in steps:
        result = worker.run(step)
        if result is None:
            continue
        sequence_T = [part.sequence for part in step.slices for _ in part.ids]
        sound_T = np.array([sequence not in broken for sequence in sequence_T])
        fault_T = np.where(sound_T, result.fault_T, NO_FAULT)
        broken.update(sequence_T[t] for t in np.flatnonzero(fault_T != NO_FAULT).tolist())
        rows = [(i, row) for i, row in enumerate(step.logit_rows) if sequence_T[row] not in broken]
        found.append(Seen(fault_T, {row: words_of(result, i) for i, row in rows}))
    return found


def words_of(result: StepResult, row: int) -> bytes:
    """The bits of a row's logits and candidates."""
    found = result.candidates[row]
    return b"".join(
        array.tobytes() for array in (result.full_logits[row], found.ids_C, found.logits_C, found.max_B, found.sum_B)
    )


def worker_of(store: Store, job: JobPlan, exchange: Exchange, kernels: Kernels, kv: KvFormat) -> Worker:
    return Worker(Transformer(store, job, exchange, kernels, kv, 256), exchange)


def run_seed(world: World, stores: dict[str, Store], kernels: Kernels, seed: int) -> tuple[str, int]:
    """What differs, in words, and how many faults there were."""
    rng = np.random.default_rng(seed)
    name = sorted(stores)[seed % len(stores)]
    store, node_of_rank = stores[name], random_nodes(rng, world.size)
    config, group, nodes = store.config, store.manifest.group_size, max(node_of_rank) + 1
    held = random_holdings(rng, config, group, nodes)
    speeds = rng.integers(1, 6, nodes).tolist() if rng.random() < 0.5 else None
    layout, environ = str(rng.choice(EXPERT_LAYOUTS)), WAYS[int(rng.integers(len(WAYS)))]
    kv = [*KvFormat][int(rng.integers(len(KvFormat)))]
    steps = list(random_steps(rng, config.vocabulary))
    exchange = open_exchange(on_nodes(world, node_of_rank), False, environ)
    job = plan_job(config, group, layout, node_of_rank=node_of_rank, holdings=held, speeds=speeds)
    worker = worker_of(store, job, exchange, kernels, kv)
    found = watch(worker, steps)
    worker.health.compare()
    if not world.is_leader:
        return "", 0
    alone = worker_of(store, plan_job(config, group, "whole", node_of_rank=[0]), Exchange(World()), kernels, kv)
    expected = watch(alone, steps)
    where = f"seed {seed}: {name}, nodes {node_of_rank}, speeds {speeds}, {layout}, {environ}, {kv.label}"
    wrong = [
        f"{where}: step {number}, partitioned: {steps[number].partitioned}"
        for number, (one, other) in enumerate(zip(expected, found, strict=True))
        if one.words_of_row != other.words_of_row or not np.array_equal(one.fault_T, other.fault_T)
    ]
    return "".join(wrong[:1]), sum(int((seen.fault_T != NO_FAULT).sum()) for seen in expected)


def main() -> None:
    """Print {"wrong": what differs, "faults": how many there were} as JSON on rank 0."""
    world = World.start(detect_launcher(os.environ))
    stores = {path.name: Store.open(path) for path in Path(sys.argv[1]).iterdir()}
    kernels = Kernels(1)
    found = []
    for seed in range(int(sys.argv[2]), int(sys.argv[3])):
        found.append(run_seed(world, stores, kernels, seed))
        world.gather_texts("")  # rank 0 was busy alone
    if world.is_leader:
        print(json.dumps({"wrong": [wrong for wrong, _ in found if wrong], "faults": sum(n for _, n in found)}))
    world.finalize()


if __name__ == "__main__":
    main()
