"""The ledger of real steps on the ranks that mpirun started: whom everybody waits for, and what was computed where."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.engine.planning.placement_report import expected_straggling, unplaced
from dist_moe.engine.requests.request import Request
from dist_moe.engine.routing.routing_facts import routing_facts
from dist_moe.engine.routing.routing_profile import ProfileCounter
from dist_moe.engine.routing.routing_record import RoutingBatch, recorded_routing
from dist_moe.engine.runtime import EngineOptions, Runtime
from dist_moe.engine.watch.accounts import PHASES, Accounts
from dist_moe.engine.watch.timeline import Span, Timeline
from dist_moe.kernels import WeightFormat
from dist_moe.parallel import clocks, ledger
from dist_moe.parallel.clocks import sample_clocks
from dist_moe.parallel.ledger import Kind
from dist_moe.parallel.plan import CHUNK_READ_COST_TOKENS
from dist_moe.parallel.world import World
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from helpers.nodes import on_nodes, on_two_hosts
from helpers.tiny_model import TinyModel, random_ids

pytestmark = pytest.mark.mpi

PREFILL, DECODE = range(len(PHASES))
TINY = TinyModel(layers=3, dense_layers=(1,))
REQUEST = Request(random_ids(9, 300), 6)
SLEEP_S = 0.01


@pytest.fixture
def store(world: World, tmp_path: Path) -> Store:
    """One store for all ranks, made by the leader."""
    directory = Path(world.gather_texts(str(tmp_path))[0]) / "store"
    if world.is_leader:
        convert(
            Checkpoint.open(TINY.write(tmp_path / "tiny")),
            directory,
            StoreOptions(format=WeightFormat.Q8),
            lambda *told: None,
        )
    world.barrier()
    return Store.open(directory)


def on_all_ranks(world: World, store: Store, lead: Callable[[Runtime], Any], experts: str = "auto") -> Any:
    """What `lead` returns on rank 0; None elsewhere."""
    runtime = Runtime(store, world, EngineOptions(context=200, experts=experts))
    if not world.is_leader:
        runtime.serve()
        return None
    result = lead(runtime)
    runtime.stop()
    return result


def test_a_steps_time_is_computing_waiting_and_wire(world: World, store: Store) -> None:
    def lead(runtime: Runtime) -> Accounts:
        runtime.generate([REQUEST])
        return runtime.accounts()

    accounts = on_all_ranks(world, store, lead)
    if accounts is None:
        return
    assert (accounts.steps_P.tolist(), accounts.tokens_P.tolist()) == ([1, 5], [9, 5])
    inside = [kind for kind in Kind if not kind.begins_on_leader]
    in_step_PR = accounts.compute_PRW.sum(axis=2) + (accounts.wait_PRK + accounts.wire_PRK)[..., inside].sum(axis=2)
    assert in_step_PR == pytest.approx(accounts.step_PR)
    for seconds in (accounts.compute_PRW, accounts.wait_PRK, accounts.wire_PRK, accounts.between_PR):
        assert (seconds >= 0).all()
    several = world.size > 1
    # Two sums a layer, the lowest fault, the candidates.
    per_step = {Kind.HEADER: 1, Kind.BROADCAST: 1, Kind.SUMS: 2 * TINY.layers, Kind.FAULTS: 1, Kind.GATHER: 1}
    for kind in Kind:
        expected = per_step.get(kind, 0) if several else 0
        assert accounts.calls_PK[:, kind].tolist() == [expected, 5 * expected], kind
    assert (accounts.sent_bytes > 0) == several


def test_the_others_wait_for_the_last_rank(world: World, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rank takes its time over the experts of each layer; nobody else does, and it waits for nobody there."""

    def lead(runtime: Runtime) -> Accounts:
        runtime.generate([REQUEST])
        return runtime.accounts()

    if world.rank == world.size - 1:
        _slow_experts(monkeypatch)
    accounts = on_all_ranks(world, store, lead)
    if accounts is None:
        return
    slept_s = 5 * TINY.layers * SLEEP_S
    assert accounts.compute_PRW[DECODE, -1].sum() >= slept_s
    if world.size > 1:
        assert (accounts.wait_PRK[DECODE, :-1, Kind.SUMS] >= accounts.wait_PRK[DECODE, -1, Kind.SUMS]).all()
        # All but the scheduler's part of what it slept was waited for, by each of the others.
        assert (accounts.wait_PRK[DECODE, :-1, Kind.SUMS] > slept_s / 4).all()


def _slow_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_moe.kernels import Kernels

    original = Kernels.experts_half

    def slow(*arguments: Any) -> None:
        time.sleep(SLEEP_S)
        original(*arguments)

    monkeypatch.setattr(Kernels, "experts_half", slow)


@pytest.mark.parametrize("experts", ["whole", "sliced", "shared"])
def test_work_is_what_the_routing_says(world: World, store: Store, experts: str) -> None:
    picked: list[np.ndarray] = []

    def lead(runtime: Runtime) -> Accounts:
        with recorded_routing(runtime.model, lambda batch: picked.append(batch.experts_TLK.copy())):
            runtime.generate([REQUEST])
        return runtime.accounts()

    accounts = on_all_ranks(world, store, lead, experts)
    if accounts is None:
        return
    work_PL = accounts.straggling.work_PRL.sum(axis=1)
    expected_PL = np.zeros_like(work_PL)
    for step, experts_TLK in enumerate(picked):
        for layer in range(TINY.layers):
            # A dense layer is one expert that every token picks.
            is_dense = layer in TINY.dense_layers
            counts_E = np.array([len(experts_TLK)]) if is_dense else np.bincount(experts_TLK[:, layer].ravel())
            work = int((counts_E[counts_E > 0] + CHUNK_READ_COST_TOKENS).sum())
            expected_PL[min(step, 1), layer] += work * store.manifest.layer_chunks_per_expert(layer)
    assert work_PL.tolist() == expected_PL.tolist()


def test_the_simulated_straggling_of_a_run_is_the_ledgers(world: World, store: Store, tmp_path: Path) -> None:
    """Every rank on a node of its own, with its own shard alone: as `place --simulate` says of the same picks."""
    nodes = on_nodes(world, range(world.size))
    directory = Path(world.gather_texts(str(tmp_path))[0])
    if world.is_leader:
        options = StoreOptions(format=WeightFormat.Q8, nodes=world.size)
        convert(Checkpoint.open(tmp_path / "tiny"), directory / "cut", options, lambda *told: None)
        for node in range(world.size):
            (directory / f"node-{node}").mkdir()
            for path in (directory / "cut").iterdir():
                if not path.name.startswith("shard-") or path.name.startswith(f"shard-{node + 1:05d}-"):
                    (directory / f"node-{node}" / path.name).hardlink_to(path)
    world.barrier()
    counters: list[ProfileCounter] = []

    def lead(runtime: Runtime) -> Accounts:
        counter = ProfileCounter(routing_facts(runtime.model, "tiny"))
        counters.append(counter)

        def take(batch: RoutingBatch) -> None:
            if len(batch.experts_TLK) == 1:
                counter.add(batch)

        with recorded_routing(runtime.model, take):
            runtime.generate([Request(random_ids(4, 300), 40)])
        return runtime.accounts()

    accounts = on_all_ranks(nodes, Store.open(directory / f"node-{world.rank}"), lead)
    if accounts is None:
        return
    profile, manifest = counters[0].profile("this run"), store.manifest
    simulated = expected_straggling(manifest, profile, unplaced(manifest, world.size), (1,) * world.size, 1)
    routed = [layer for layer in range(TINY.layers) if layer not in TINY.dense_layers]
    assert accounts.straggling.of_nodes_PL[DECODE, routed].mean() == pytest.approx(simulated)
    assert simulated > 1 or world.size == 1


def test_notes_that_fill_up_are_settled_on_the_way(world: World, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def lead(runtime: Runtime) -> list[Any]:
        runtime.generate([REQUEST])
        accounts = runtime.accounts()
        return [accounts.steps_P.tolist(), accounts.calls_PK[DECODE, Kind.SUMS], accounts.sent_bytes, accounts.dropped]

    whole = on_all_ranks(world, store, lead)
    monkeypatch.setattr(ledger, "STEPS", 2)
    often = on_all_ranks(world, store, lead)
    if whole is not None:
        assert often[:2] == whole[:2]
        assert often[3] == 0
        assert (often[2] > whole[2]) == (world.size > 1)  # the notes travel, too, and are counted


def test_clocks_of_other_hosts_are_found_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the upper third of the ranks were on a host whose clock began an hour earlier."""
    there = on_two_hosts(world)
    ahead_ns = 3600 * 10**9 if there.node else 0
    original = time.perf_counter_ns
    monkeypatch.setattr(clocks.time, "perf_counter_ns", lambda: original() + ahead_ns)
    sample = sample_clocks(there)
    monkeypatch.undo()
    if not world.is_leader:
        return
    for rank, node in enumerate(there.node_of_rank):
        wrong_ns = sample.offset_R[rank] - (3600 * 10**9 if node else 0)
        assert abs(wrong_ns) <= sample.error_ns
    assert (sample.error_ns > 0) == (there.nodes > 1)


def test_a_timeline_has_every_step_of_every_rank(world: World, store: Store) -> None:
    def lead(runtime: Runtime) -> Timeline:
        runtime.generate([Request(random_ids(3, 300), 2)])  # before the timeline
        with runtime.timeline() as timeline:
            runtime.generate([REQUEST])
        runtime.generate([Request(random_ids(3, 300), 2)])  # after it
        return timeline

    timeline = on_all_ranks(world, store, lead)
    if timeline is None:
        return
    assert len(timeline) == 6
    spans = list(timeline.spans())
    for rank in range(world.size):
        own = [span for span in spans if span.rank == rank]
        assert [span.name for span in own if span.category == "step"] == [f"step {n}" for n in range(6)]
        for layer in range(TINY.layers):
            for half in ("attention", "experts"):
                assert sum(span.name == f"{half} {layer}" for span in own) == 2 * 6  # up to the sums, and after them
        exchanges = [span for span in own if span.name == "sums"]
        assert len(exchanges) == (2 * TINY.layers * 6 if world.size > 1 else 0)
        assert [span.facts["layer"] for span in exchanges[: 2 * TINY.layers]] == [0, 0, 1, 1, 2, 2][: len(exchanges)]
        require_nesting(own)


def require_nesting(spans: list[Span]) -> None:
    """Any two spans of a rank are apart, or one lies in the other."""
    open_until: list[int] = []
    for span in sorted(spans, key=lambda span: (span.begin_ns, -span.end_ns)):
        assert span.begin_ns <= span.end_ns
        while open_until and open_until[-1] <= span.begin_ns:
            open_until.pop()
        assert not open_until or span.end_ns <= open_until[-1], span
        open_until.append(span.end_ns)
