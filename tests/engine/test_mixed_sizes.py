"""What sums units' bytes, for stores whose units are of unequal bytes: memory, bounds, placements, read-ahead."""

from __future__ import annotations

import numpy as np
import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.engine.measuring.bench_bound import step_work
from dist_moe.engine.planning.placement_report import node_facts
from dist_moe.engine.planning.placing import parse_budget, place_model, routed_layers
from dist_moe.engine.routing.routing_profile import assumed_profile
from dist_moe.engine.start.memory import Demand, host_need
from dist_moe.kernels import KvFormat
from dist_moe.model.own_spans import own_spans
from dist_moe.model.step import Slice, Step
from dist_moe.parallel.plan import plan_job
from dist_moe.store.reader import Store
from dist_moe.store.recipe_file import parse_recipe
from dist_moe.store.unit_parts import unit_sizes
from dist_moe.store.units import UNIT_KINDS, UnitKind
from helpers.plans import plan_of
from helpers.tiny_store import ODD, run_convert

RECIPE = """
format = "q4"
[[rule]]
kind = ["q", "lm_head"]
format = "q8"
[[rule]]
experts = "1,3"
layers = "0"
format = "bf16"
[[rule]]
layers = "2"
kind = "down"
format = "f32"
"""
EXPERTS = 5


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    directory = tmp_path_factory.mktemp("mixed")
    source = Checkpoint.open(ODD.write(directory / "odd"))
    formats = parse_recipe(RECIPE, "r").formats(source.config)
    run_convert(source, directory / "store", nodes=2, formats=formats)
    return Store.open(directory / "store")


def places(store: Store) -> list[tuple[UnitKind, int]]:
    layers = range(store.config.layers)
    return [(kind, layer) for kind in UNIT_KINDS for layer in (layers if kind != "vocabulary" else [0])]


def test_memory_counts_every_unit_once(store: Store) -> None:
    plans = plan_job(store.config, store.manifest.group_size, "whole", node_of_rank=[0, 0]).plans
    need = host_need(store.manifest, plans, [1, 1], Demand(KvFormat.F16, 64, 8))
    held = sum(
        store.unit(kind, layer, i).nbytes for kind, layer in places(store) for i in store.present_units(kind, layer)
    )
    assert need.weights_bytes == held + store.manifest.files[0].file_bytes


def test_a_step_that_picks_all_experts_reads_all_units(store: Store) -> None:
    config = store.config
    step = Step((Slice(0, 0, (1,)),), (0,), (0.0,), False, config.vocabulary)
    total = step_work(store.manifest, KvFormat.F16, step, [EXPERTS, EXPERTS]).total
    units = sum(int(unit_sizes(store.manifest, kind, layer).sum()) for kind, layer in places(store))
    floats = 4 * config.layers * (2 * config.model_dim + 2 * config.head_dim)
    routers = sum(store.common(f"layers.{layer}.router").nbytes for layer in routed_layers(config))
    embedding = config.model_dim * store.common("embedding").itemsize
    # A dense layer's work is without the norm before it, as in the bound of any store.
    dense_norm = 4 * config.model_dim
    assert total.bytes == pytest.approx(units + floats + routers + embedding - dense_norm, abs=1)
    fewer = step_work(store.manifest, KvFormat.F16, step, [1, EXPERTS]).total
    chunks_0 = int(unit_sizes(store.manifest, "chunk", 0).sum())
    assert total.bytes - fewer.bytes == pytest.approx(chunks_0 * (EXPERTS - 1) / EXPERTS)
    # In f32: two of five experts of layer 0, all down of layer 2, the routers, and attention with itself.
    per_matrix = 2 * config.experts_per_token * config.model_dim * config.expert_hidden
    routed = 2 * 2 * config.model_dim * EXPERTS + 3 * 4 * config.heads * config.head_dim
    assert total.f32 == pytest.approx(3 * per_matrix * 2 / 5 + per_matrix + routed)


def test_a_budget_of_bytes_holds_whichever_experts_a_node_gets(store: Store) -> None:
    manifest = store.manifest
    profile = assumed_profile(routed_layers(manifest.config), EXPERTS, 2, 1.0)
    budget = parse_budget("0.00038GB")
    placement = place_model(manifest, profile, (1, 1), budget)
    for facts, shard in zip(node_facts(manifest, placement), placement.shards, strict=True):
        units = [
            (kind, layer, i) for kind, layer in places(store) for run in shard.runs(kind, layer) for i in range(*run)
        ]
        assert facts.shard_bytes == sum(store.unit(*unit).nbytes for unit in units)
        assert facts.shard_bytes <= (budget.node_bytes or 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_read_ahead_is_what_a_rank_computes_with(store: Store, rank: int) -> None:
    plan = plan_of(store, rank, 2, "whole")
    spans = [*own_spans(store, plan, store.config.layers).own]
    expected = np.zeros(0, np.int64)
    units: dict[UnitKind, list[int]] = {"head": [*plan.heads], "kv_head": [*plan.kv_heads]}
    for layer in range(store.config.layers):
        units["chunk"] = plan.readable_chunks(layer).tolist()
        for kind, indices in units.items():
            for index in indices:
                view = store.unit(kind, layer, index)
                first = view.ctypes.data
                assert any(a <= first and first + view.nbytes <= a + count for a, count in spans), (kind, layer, index)
                expected = np.append(expected, view.nbytes)
    vocabulary = sum(store.unit("vocabulary", 0, i).nbytes for i in plan.vocabulary_blocks)
    assert 0 <= sum(count for _, count in spans) - int(expected.sum()) - vocabulary < 4096 * len(spans)
