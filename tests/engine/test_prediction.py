"""Predicted steps: arithmetic by hand, and what must be slower or faster than what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.engine.measuring.bench_bound import Machine, Work
from dist_moe.engine.planning.planning import (
    ANSWER_TOKENS,
    PlanReport,
    Ranks,
    Workload,
    check_request,
    make_report,
    node_need,
)
from dist_moe.engine.planning.prediction import (
    Q4_READ_SHARE,
    READ_SHARE,
    STEP_PHASES,
    Nodes,
    Predictor,
    Split,
    phase_seconds,
)
from dist_moe.engine.start.memory import Demand
from dist_moe.errors import UsageError
from dist_moe.kernels import KvFormat
from dist_moe.parallel.cost import PRESET_LINKS, LinkCosts, step_traffic
from dist_moe.store.described import describe_model

CONFIGS = Path(__file__).parents[2] / "configs"
MANIFEST = describe_model(str(CONFIGS / "qwen3-30b-a3b.toml"), None)
DENSE = describe_model(str(CONFIGS / "qwen3-0.6b.toml"), "q8")
NODE = Nodes(1, 1, 2, Machine(40e9, 700e9, 400e9), PRESET_LINKS["10gbe"], "avx512vnni")
WORKLOAD = Workload(Demand(KvFormat.F16, 4096, 256), prompt=512, batch=1)
GIGA = 10**9


def predictor(nodes: Nodes = NODE, experts: str = "whole", manifest: object = MANIFEST) -> Predictor:
    return Predictor(
        MANIFEST if manifest is MANIFEST else DENSE, KvFormat.F16, nodes, Split(experts, True, "allreduce")
    )


def test_a_phase_reads_and_computes_partly_at_once() -> None:
    # 3 s of reading at READ_SHARE of 1 B/s; 4 s of computing: one operation at half of 1/s, two in f32 at half of 2/s.
    machine = Machine(read=1.0, int8=1.0, f32=2.0)
    assert phase_seconds(Work(3 * READ_SHARE, int8=1, f32=2), machine, 0.5) == pytest.approx(5.0)


def test_decoding_reads_the_active_weights() -> None:
    # 30B in q4: 1.71 GB a token at 40 GB/s x Q4_READ_SHARE, 54 ms, and calls.
    seconds = predictor().decode(0, 1).seconds
    assert 1.71 / 40 < seconds < 1.71 / 40 / Q4_READ_SHARE + 0.015


def test_a_prompt_is_its_chunks() -> None:
    one, two = predictor().prefill(256, 256), predictor().prefill(512, 256)
    assert two.seconds > 2 * one.seconds  # the second chunk attends to the first, too
    assert predictor().prefill(300, 256).seconds > one.seconds


def test_the_traffic_is_that_of_the_cost_model() -> None:
    nodes = replace(NODE, nodes=4)
    traffic = predictor(nodes).decode(0, 3).traffic
    expected = step_traffic(predictor(nodes)._shape, 4, 3, "allreduce", nodes.link)
    assert traffic.bytes == expected.bytes
    assert traffic.phases == expected.phases + STEP_PHASES


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 8000), st.integers(0, 8000), st.integers(1, 15))
def test_more_depth_or_sequences_never_decode_a_step_faster(depth: int, more: int, batch: int) -> None:
    now = predictor().decode(depth, batch).seconds
    assert predictor().decode(depth + more, batch).seconds >= now
    assert predictor().decode(depth, batch + 1).seconds >= now


@settings(max_examples=10, deadline=None)
@given(st.floats(1, 10), st.integers(1, 6))
def test_a_faster_machine_is_never_slower(factor: float, nodes: int) -> None:
    machine = Machine(NODE.machine.read * factor, NODE.machine.int8 * factor, NODE.machine.f32 * factor)
    link = LinkCosts(NODE.link.latency_s / factor, NODE.link.bytes_per_s * factor)
    now = predictor(replace(NODE, nodes=nodes))
    better = predictor(replace(NODE, nodes=nodes, machine=machine, link=link))
    assert better.decode(100, 1).seconds <= now.decode(100, 1).seconds
    assert better.prefill(300, 256).seconds <= now.prefill(300, 256).seconds


@pytest.mark.parametrize("experts", ["whole", "sliced"])
def test_more_nodes_compute_less_each(experts: str) -> None:
    seconds = [predictor(replace(NODE, nodes=count), experts).decode(100, 1).compute_s for count in (1, 2, 4, 8)]
    assert seconds == sorted(seconds, reverse=True)


def test_whole_experts_keep_nodes_waiting() -> None:
    nodes = replace(NODE, nodes=4)
    assert predictor(nodes, "whole").decode(0, 1).compute_s > 1.2 * predictor(nodes, "sliced").decode(0, 1).compute_s


def test_dense_models_and_tiles() -> None:
    dense = predictor(replace(NODE, nodes=2), "sliced", DENSE)
    assert dense.decode(0, 1).compute_s < predictor(NODE, "shared", DENSE).decode(0, 1).compute_s
    assert predictor(replace(NODE, isa="amx")).prefill(256, 256).seconds > predictor().prefill(256, 256).seconds


def report(memory_bytes: int = 0, link: str = "10gbe", counts: range = range(1, 5)) -> PlanReport:
    return make_report(MANIFEST, replace(NODE, link=PRESET_LINKS[link]), counts, WORKLOAD, memory_bytes)


def test_every_way_is_listed_and_the_best_one_wins() -> None:
    found = report()
    assert [(way.nodes, way.experts) for way in found.ways] == [
        (1, "shared"),
        *((nodes, layout) for nodes in (2, 3, 4) for layout in ("whole", "sliced")),
    ]
    assert found.winner.request_seconds == min(way.request_seconds for way in found.ways)
    best = found.winner
    costs = (min(cost.seconds for cost in kind.values()) for kind in (best.prefill, best.decode))
    assert best.request_seconds == pytest.approx(next(costs) + ANSWER_TOKENS * next(costs))


def test_a_slow_net_makes_more_nodes_slower() -> None:
    slow = replace(NODE, link=LinkCosts(2e-3, 1e7))
    found = make_report(MANIFEST, slow, range(1, 4), WORKLOAD, 0)
    assert (1, 2) in [(fewer.nodes, more.nodes) for fewer, more in found.slower_steps()]
    assert found.winner.nodes == 1
    assert not list(report().slower_steps())


def test_what_fits_is_planned_and_the_rest_is_named() -> None:
    found = report(10 * GIGA)  # 30B in q4 is 17.9 GB
    assert [nodes for nodes, _ in found.too_small] == [1]
    assert {way.nodes for way in found.ways} == {2, 3, 4}
    assert all(way.need.full_bytes <= 10 * GIGA for way in found.ways)


def test_memory_is_the_weights_of_a_share_and_the_cache() -> None:
    one = node_need(MANIFEST, Ranks(1, 1, 2), "shared", WORKLOAD)
    two = node_need(MANIFEST, Ranks(2, 1, 2), "whole", WORKLOAD)
    # 4096 positions x 48 layers x 4 KV heads x 2 x 128 x 2 bytes
    assert one.kv_bytes == 4096 * 48 * 4 * 512 == 2 * two.kv_bytes
    shared_bytes = 2 * two.weights_bytes - one.weights_bytes  # what both nodes hold: embedding, routers, norms
    assert 151936 * 2048 * 2 + 48 * 128 * 2048 * 2 <= shared_bytes < 0.05 * one.weights_bytes


@pytest.mark.parametrize(
    ("workload", "memory_bytes", "words"),
    [
        (WORKLOAD, 8 * GIGA, "qwen3-30b-a3b in q4 does not fit on 2 nodes of 8.0 GB: each needs 9.4 GB"),
        (WORKLOAD, 8 * GIGA, "take --nodes 3, fewer bits"),
        (WORKLOAD, GIGA // 10, "no number of nodes is enough"),
        (replace(WORKLOAD, demand=Demand(KvFormat.F16, 50000, 256)), 0, "--ctx 50000: the model has 40960 positions"),
        (replace(WORKLOAD, prompt=4096), 0, "--prompt 4096: leaves no room to answer in 4096 positions"),
    ],
)
def test_what_cannot_run_is_refused(workload: Workload, memory_bytes: int, words: str) -> None:
    with pytest.raises(UsageError, match=r"^(?s:.*)" + words.replace("(", r"\(")):
        check_request(MANIFEST, Ranks(1, 1, 2), range(1, 3), workload, memory_bytes)
