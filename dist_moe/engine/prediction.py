"""How fast a model will run on a number of nodes: from what a node reads and computes, and what a link takes.

The bytes and operations are those that bench compares with (bench_bound.py), cut to the busiest rank's part. What the
kernels make of a machine's walls stands in `Kernel` constants below: found once, by benchmarks/predictions.py's cases
on different machines' levels, and the same for every case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from dist_moe.engine.bench_bound import (
    Machine,
    Work,
    attention_work,
    experts_work,
    logits_work,
    projections_work,
    router_work,
)
from dist_moe.engine.straggling import busiest_share, busiest_tokens, distinct_experts
from dist_moe.kernels import KvFormat
from dist_moe.model.step import Slice
from dist_moe.parallel.cost import ExchangeKind, LinkCosts, Traffic, WireShape, step_traffic
from dist_moe.split import contiguous, head_range_kv_heads
from dist_moe.store.manifest import Manifest
from dist_moe.store.units import unit_count

# Reading and computing overlap partly: a phase takes (read^p + compute^p)^(1/p); p = 1 is not at all.
OVERLAP = 1.2
# Shares of our matmul's speed in the L1 cache (of bare f32 for attention) that whole phases reach.
PROJECTION_SHARE = 0.45
EXPERT_SHARE = 0.45
LOGITS_SHARE = 1.0
ATTENTION_SHARE = 0.5  # of many queries against one KV head
QUERY_SHARE = 0.25  # of a single token's

HALF_LAYER_S = 20e-6  # calls from Python, norms and residual of half a layer
WAKE_S = 130e-6  # threads of a rank waiting for each other in half a layer
STEP_S = 150e-6  # Python and messages of a step
TOKEN_S = 10e-6  # embedding, rotary angles and norms of one token in all layers
CANDIDATE_S = 2.3e-9  # to look at one logit when a token is drawn
NODE_SUM_S = 4e-6  # ranks of a node waiting for each other in half a layer
NODE_SUM_BYTES_PER_S = 4e9  # sums through a node's shared memory
STEP_PHASES = 3  # between nodes, beside the layers: header, words, candidates


@dataclass(frozen=True)
class Nodes:
    """The machines that a model shall run on, all alike.

    Attributes:
        nodes: How many.
        ranks: On each of them.
        threads: Of each rank.
        machine: What one node allows: bytes/s, operations/s of our int8 matmul in L1, and of bare f32.
        link: Between any two of them.
    """

    nodes: int
    ranks: int
    threads: int
    machine: Machine
    link: LinkCosts

    @property
    def all_ranks(self) -> int:
        """Over all nodes."""
        return self.nodes * self.ranks

    @property
    def rank_machine(self) -> Machine:
        """A rank's part of its node."""
        machine, ranks = self.machine, self.ranks
        return Machine(machine.read / ranks, machine.int8 / ranks, machine.f32 / ranks)


@dataclass(frozen=True)
class Split:
    """How the work is split: who owns experts, and how nodes exchange.

    Attributes:
        experts: "whole", "sliced" or "shared" over `owners`.
        inside: Ranks of a node share what the node owns; else every rank owns its own.
        exchange: Between nodes.
    """

    experts: str
    inside: bool
    exchange: ExchangeKind


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step, and what one node sends in it."""

    compute_s: float
    wait_s: float  # calls, threads and ranks waiting for each other
    traffic: Traffic
    wire_s: float

    @property
    def seconds(self) -> float:
        """All together."""
        return self.compute_s + self.wait_s + self.wire_s

    def __add__(self, other: StepCost) -> StepCost:
        """One after the other."""
        return StepCost(
            self.compute_s + other.compute_s,
            self.wait_s + other.wait_s,
            self.traffic + other.traffic,
            self.wire_s + other.wire_s,
        )


class Predictor:
    """Predicts the steps of one model on some nodes."""

    def __init__(self, manifest: Manifest, kv: KvFormat, nodes: Nodes, split: Split) -> None:
        """Nothing is read but the manifest."""
        self._manifest = manifest
        self._config = manifest.config
        self._kv = kv
        self._nodes = nodes
        self._split = split
        self._shape = WireShape.of(manifest.config, manifest.format.quantized)

    def decode(self, depth: int, batch: int) -> StepCost:
        """One step in which each of `batch` sequences that hold `depth` tokens gets one."""
        return self.step([Slice(sequence, depth, (0,)) for sequence in range(batch)], rows=batch)

    def prefill(self, tokens: int, chunk: int) -> StepCost:
        """All steps of a prompt, the last of which draws a token."""
        sizes = [chunk] * (tokens // chunk) + ([tokens % chunk] if tokens % chunk else [])
        starts = accumulate(sizes[:-1], initial=0)
        steps = [
            self.step([Slice(0, start, (0,) * size)], rows=int(start + size == tokens))
            for start, size in zip(starts, sizes, strict=True)
        ]
        return sum(steps[1:], steps[0])

    def step(self, slices: Sequence[Slice], rows: int) -> StepCost:
        """One step of some tokens, of which `rows` are drawn."""
        nodes, config = self._nodes, self._config
        T = sum(len(part.ids) for part in slices)
        compute_s = config.layers * self._attention_s(slices, T)
        compute_s += sum(count * seconds for count, seconds in self._layers(T))
        compute_s += self._logits_s(rows) + T * TOKEN_S
        wait_s = STEP_S + 2 * config.layers * self._half_layer_wait_s(T)
        traffic = Traffic()
        if nodes.nodes > 1:
            traffic = step_traffic(self._shape, nodes.nodes, T, self._split.exchange, nodes.link)
            traffic += Traffic(phases=STEP_PHASES)
        return StepCost(compute_s, wait_s, traffic, traffic.seconds(nodes.link))

    # ---- parts of a step, each on its busiest rank ----

    def _attention_s(self, slices: Sequence[Slice], T: int) -> float:
        """The attention half of one layer."""
        heads, kv_heads = self._busiest_heads()
        machine = self._nodes.rank_machine
        seconds = phase_seconds(projections_work(self._manifest, T, heads, kv_heads), machine, PROJECTION_SHARE)
        for single, share in ((True, QUERY_SHARE), (False, ATTENTION_SHARE)):
            some = [part for part in slices if (len(part.ids) == 1) == single]
            if some:
                work = attention_work(self._manifest, self._kv, some, heads, kv_heads)
                seconds += phase_seconds(work, machine, share)
        return seconds

    def _busiest_heads(self) -> tuple[int, int]:
        """Query heads and KV heads of the rank that has most."""
        config, ranks = self._config, self._nodes.all_ranks
        runs = [contiguous(config.heads, ranks, rank) for rank in range(ranks)]
        return max((len(run), len(head_range_kv_heads(run, config.heads_per_kv_head))) for run in runs)

    def _layers(self, T: int) -> Iterator[tuple[int, float]]:
        """Each kind of expert half, and its seconds."""
        config = self._config
        kinds = Counter((config.is_dense(layer), config.layer_hidden(layer)) for layer in range(config.layers))
        for layer in range(config.layers):
            if count := kinds.pop((config.is_dense(layer), config.layer_hidden(layer)), 0):
                yield count, self._experts_s(layer, T)

    def _experts_s(self, layer: int, T: int) -> float:
        """The expert half of a layer."""
        config, nodes, split = self._config, self._nodes, self._split
        parts = nodes.nodes if split.inside else nodes.all_ranks
        machine = nodes.machine if split.inside else nodes.rank_machine
        chunks = self._manifest.layer_chunks_per_expert(layer)
        if config.is_dense(layer):
            share = busiest_share(split.experts, 1, chunks, parts, 1)
            return phase_seconds(
                _scaled(experts_work(self._manifest, layer, T, 1), share, share), machine, EXPERT_SHARE
            )
        E, K = config.experts, config.experts_per_token
        distinct = distinct_experts(E, K, T)
        read_share = busiest_share(split.experts, E, chunks, parts, distinct)
        token_share = busiest_tokens(E, K, parts, T) if split.experts == "whole" and T > 1 else read_share
        work = _scaled(experts_work(self._manifest, layer, T * K, distinct), read_share, token_share)
        routed = T if split.exchange == "allreduce" or nodes.nodes == 1 else -(-T // nodes.nodes)
        router_s = phase_seconds(router_work(self._manifest, routed), nodes.rank_machine, 1.0)
        return phase_seconds(work, machine, EXPERT_SHARE) + router_s

    def _logits_s(self, rows: int) -> float:
        """The rows of logits, and drawing from them."""
        if not rows:
            return 0.0
        config, ranks = self._config, self._nodes.all_ranks
        blocks = -(-unit_count(config, self._manifest.group_size, "vocabulary", 0) // ranks)
        work = logits_work(self._manifest, rows, blocks)
        seconds = phase_seconds(work, self._nodes.rank_machine, LOGITS_SHARE)
        return seconds + rows * CANDIDATE_S * config.vocabulary / ranks

    def _half_layer_wait_s(self, T: int) -> float:
        """What half a layer costs beside its arithmetic and the wire."""
        nodes = self._nodes
        seconds = HALF_LAYER_S + (WAKE_S if nodes.threads > 1 else 0.0)
        if nodes.ranks > 1:
            sums_bytes = 8 * T * self._config.model_dim * nodes.ranks
            seconds += NODE_SUM_S + sums_bytes / NODE_SUM_BYTES_PER_S
        return seconds


def phase_seconds(work: Work, machine: Machine, share: float) -> float:
    """The time of a phase that reaches a share of the machine's arithmetic, reading and computing partly overlapped."""
    read_s = work.bytes / machine.read
    compute_s = (work.int8 / machine.int8 + work.f32 / machine.f32) / share
    return float((read_s**OVERLAP + compute_s**OVERLAP) ** (1 / OVERLAP))


def _scaled(work: Work, bytes_share: float, operations_share: float) -> Work:
    return Work(work.bytes * bytes_share, work.int8 * operations_share, work.f32 * operations_share)
