"""The report of `dist-moe plan`: Markdown for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dist_moe.engine.planning.planning import ANSWER_TOKENS, PlanReport, Way
from dist_moe.engine.planning.prediction import Nodes, StepCost
from dist_moe.engine.start.record import show_bytes
from dist_moe.store.manifest import Manifest


@dataclass(frozen=True)
class Facts:
    """What the predictions rest on."""

    manifest: Manifest
    nodes: Nodes
    memory_bytes: int
    net: str


def render(form: str, report: PlanReport, facts: Facts) -> str:
    """The report as text, without a newline at its end; `form` is "md" or "json"."""
    if form == "json":
        return json.dumps(_as_json(report, facts), indent=1)
    return "\n".join(_as_text(report, facts))


def _as_json(report: PlanReport, facts: Facts) -> dict[str, Any]:
    nodes = facts.nodes
    return {
        "model": facts.manifest.source_name,
        "weights": facts.manifest.label,
        "net": facts.net,
        "latency_us": _round(nodes.link.latency_s * 1e6),
        "link_gb_s": _round(nodes.link.bytes_per_s / 1e9),
        "read_gb_s": _round(nodes.machine.read / 1e9),
        "matmul_gops": _round(nodes.machine.int8 / 1e9),
        "f32_gops": _round(nodes.machine.f32 / 1e9),
        "isa": nodes.isa,
        "memory_bytes": facts.memory_bytes,
        "ranks_per_node": nodes.ranks,
        "threads": nodes.threads,
        "ways": [_row(way, facts) for way in report.ways],
        "best": _row(report.winner, facts),
        "too_small": [{"nodes": count, "needs_bytes": need} for count, need in report.too_small],
        "slower": [{"nodes": more.nodes, "than_nodes": fewer.nodes} for fewer, more in report.slower_steps()],
        "sentence": _sentence(report),
    }


def _row(way: Way, facts: Facts) -> dict[str, Any]:
    need = way.need
    decode, prefill = way.exchanges
    return {
        "nodes": way.nodes,
        "experts": way.experts,
        "memory_bytes": need.full_bytes,
        "weights_bytes": need.weights_bytes,
        "kv_bytes": need.kv_bytes,
        "buffer_bytes": need.buffer_bytes,
        "decode_exchange": decode,
        "decode_tokens_per_s": _round(way.decode_tokens_per_s()),
        "prefill_exchange": prefill,
        "prefill_tokens_per_s": _round(way.prefill_tokens_per_s()),
        "decode": [_cost(name, cost, way.workload.batch, facts) for name, cost in way.decode.items()],
        "prefill": [_cost(name, cost, way.workload.prompt, facts) for name, cost in way.prefill.items()],
    }


def _cost(exchange: str, cost: StepCost, tokens: int, facts: Facts) -> dict[str, Any]:
    """One kind of steps with one exchange; bytes are what one node sends, which is what it receives."""
    return {
        "exchange": exchange,
        "tokens_per_s": _round(tokens / cost.seconds),
        "compute_ms": _round((cost.compute_s + cost.wait_s) * 1e3),
        "exchange_ms": _round(cost.wire_s * 1e3),
        "bytes_per_token": round(cost.traffic.bytes / tokens),
        "bytes_per_token_and_layer": round(cost.traffic.bytes / tokens / facts.manifest.config.layers),
    }


def _as_text(report: PlanReport, facts: Facts) -> Iterator[str]:
    manifest, nodes, workload = facts.manifest, facts.nodes, report.winner.workload
    yield (
        f"{manifest.source_name} in {manifest.label}, KV {workload.demand.kv.label} for "
        f"{workload.demand.context} positions; prompt {workload.prompt}, {workload.batch} decoding; "
        f"{_count(nodes.ranks, 'rank')} x {_count(nodes.threads, 'thread')} on each node"
    )
    memory = f"{show_bytes(facts.memory_bytes)} of memory" if facts.memory_bytes else "memory unknown"
    yield (
        f"A node: {nodes.machine.read / 1e9:.1f} GB/s, {nodes.machine.int8 / 1e9:.0f} GOPS ({nodes.isa}), {memory}. "
        f"The net ({facts.net}): {nodes.link.latency_s * 1e6:.0f} us and {nodes.link.bytes_per_s / 1e9:.3g} GB/s."
    )
    yield ""
    yield (
        "| nodes | experts | memory per node | decode tokens/s | ms: compute + exchange | KB per token (and layer) "
        "| prefill tokens/s | KB per token (and layer) |"
    )
    yield "|--:|---|--:|--:|--:|--:|--:|--:|"
    for way in report.ways:
        yield "| " + " | ".join(_cells(_row(way, facts))) + " |"
    yield ""
    if report.ways[-1].nodes > 1:
        yield "Of two figures the first is with --exchange allreduce, the second with alltoall; auto takes the better."
    for count, need_bytes in report.too_small:
        yield f"{_count(count, 'node')}: does not fit, each needs {show_bytes(need_bytes)}."
    need = report.winner.need
    yield (
        f"A node of the best choice holds weights {show_bytes(need.weights_bytes)}, KV cache "
        f"{show_bytes(need.kv_bytes)}, buffers {show_bytes(need.buffer_bytes)}."
    )
    for fewer, more in report.slower_steps():
        yield (
            f"Warning: {_count(more.nodes, 'node')} decode slower than {fewer.nodes}: "
            f"{more.decode_tokens_per_s():.1f} against {fewer.decode_tokens_per_s():.1f} tokens/s."
        )
    yield _sentence(report)


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield str(row["nodes"])
    yield row["experts"]
    yield show_bytes(row["memory_bytes"])
    for kind in ("decode", "prefill"):
        yield " / ".join(f"{cost['tokens_per_s']:.1f}" for cost in row[kind])
        if kind == "decode":
            yield " / ".join(f"{cost['compute_ms']:.1f} + {cost['exchange_ms']:.1f}" for cost in row[kind])
        yield " / ".join(
            f"{cost['bytes_per_token'] / 1e3:.0f} ({cost['bytes_per_token_and_layer'] / 1e3:.1f})" for cost in row[kind]
        )


def _sentence(report: PlanReport) -> str:
    """The best choice."""
    way = report.winner
    how = "one node"
    if way.nodes > 1:
        decode, prefill = way.exchanges
        exchange = decode if decode == prefill else f"auto ({decode} in decoding, {prefill} in prefill)"
        how = f"{way.nodes} nodes, {way.experts} experts, exchange {exchange}"
    return (
        f"Best for a prompt of {way.workload.prompt} tokens and {ANSWER_TOKENS} of an answer: {how}: "
        f"{way.decode_tokens_per_s():.1f} tokens/s in decoding, {way.prefill_tokens_per_s():.0f} in prefill."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _round(value: float) -> float:
    return float(f"{value:.6g}")
