"""How fast a model will run on a number of nodes: from what a node reads and computes, and what a link takes.

The bytes and operations are those that bench compares with (bench_bound.py), cut to the busiest rank's part. What the
kernels make of a machine's walls are the constants below: found once from steps whose parts were timed (`run --stats`),
on one and two threads and two levels of kernels, and the same for every model, case and machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import hypot

from dist_moe.engine.measuring.bench_bound import (
    Machine,
    Work,
    attention_work,
    experts_work,
    logits_work,
    projections_work,
    router_work,
)
from dist_moe.engine.planning.straggling import busiest_share, busiest_tokens, distinct_experts
from dist_moe.kernels import KvFormat, WeightFormat
from dist_moe.kernels.formats import MatrixFormat
from dist_moe.model.step import Slice
from dist_moe.parallel.cost import ExchangeKind, LinkCosts, Traffic, WireShape, step_traffic
from dist_moe.split import contiguous, head_range_kv_heads
from dist_moe.store.manifest import Manifest
from dist_moe.store.units import unit_count

# Reading and computing overlap partly: a phase takes the root of the sum of both times' squares.
READ_SHARE = 0.92  # of the reading loop's speed that weights are read with
Q4_READ_SHARE = 0.79  # by units of a layer in q4: unpacking the codes takes as long as reading them
LOGITS_SHARE = 0.8  # of our matmul's speed in the L1 cache; PHASE_SHARES has the layers'
ATTENTION_SHARE = 0.5  # of bare f32 arithmetic: many queries against one KV head
QUERY_SHARE = 0.3  # of a single token's

HALF_LAYER_S = 70e-6  # calls from Python, norms, residual, and threads waiting for each other in half a layer
STEP_S = 200e-6  # Python and messages of a step
TOKEN_S = 10e-6  # embedding and rotary angles of one token
CANDIDATE_S = 2.6e-9  # to look at one logit when a token is drawn
NODE_SUM_S = 4e-6  # ranks of a node waiting for each other in half a layer
NODE_SUM_BYTES_PER_S = 4e9  # sums through a node's shared memory
STEP_PHASES = 3  # between nodes, beside the layers: header, words, candidates


@dataclass(frozen=True)
class PhaseShares:
    """Shares of our matmul's speed in the L1 cache that projections and experts reach as a whole."""

    projections: float
    experts: float


VECTOR_SHARES = PhaseShares(0.62, 0.70)
# Tiles compute so fast that unpacking the weights for them decides.
PHASE_SHARES = {"amx": PhaseShares(0.51, 0.44)}


@dataclass(frozen=True)
class Nodes:
    """The machines that a model shall run on, all alike.

    Attributes:
        nodes: How many.
        ranks: On each of them.
        threads: Of each rank.
        machine: What one node allows: bytes/s, operations/s of our int8 matmul in L1, and of bare f32.
        link: Between any two of them.
        isa: Level of the kernels.
    """

    nodes: int
    ranks: int
    threads: int
    machine: Machine
    link: LinkCosts
    isa: str

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
        self._shares = PHASE_SHARES.get(nodes.isa, VECTOR_SHARES)
        self._layers = _unlike_layers(manifest)
        self._shape = WireShape.of(manifest.config, manifest.formats.quantized)

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
        compute_s = sum(
            count * (self._attention_s(layer, slices, T) + self._experts_s(layer, T)) for layer, count in self._layers
        )
        compute_s += self._logits_s(rows) + T * TOKEN_S
        wait_s = STEP_S + 2 * config.layers * self._half_layer_wait_s(T)
        traffic = Traffic()
        if nodes.nodes > 1:
            traffic = step_traffic(self._shape, nodes.nodes, T, self._split.exchange, nodes.link)
            traffic += Traffic(phases=STEP_PHASES)
        return StepCost(compute_s, wait_s, traffic, traffic.seconds(nodes.link))

    # ---- parts of a step, each on its busiest rank ----

    def _attention_s(self, layer: int, slices: Sequence[Slice], T: int) -> float:
        """The attention half of a layer."""
        heads, kv_heads = self._busiest_heads()
        machine = self._nodes.rank_machine
        work = projections_work(self._manifest, layer, T, heads, kv_heads)
        read_share = _read_share(self._manifest.formats.layers[layer].q)
        seconds = phase_seconds(work, machine, self._shares.projections, read_share)
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

    def _experts_s(self, layer: int, T: int) -> float:
        """The expert half of a layer."""
        config, nodes, split = self._config, self._nodes, self._split
        parts = nodes.nodes if split.inside else nodes.all_ranks
        machine = nodes.machine if split.inside else nodes.rank_machine
        chunks = self._manifest.layer_chunks_per_expert(layer)
        weights_share = _read_share(self._manifest.formats.layers[layer].gate_up[0])
        if config.is_dense(layer):
            share = busiest_share(split.experts, 1, chunks, parts, 1)
            work = _scaled(experts_work(self._manifest, layer, T, 1), share, share)
            return phase_seconds(work, machine, self._shares.experts, weights_share)
        E, K = config.experts, config.experts_per_token
        distinct = distinct_experts(E, K, T)
        read_share = busiest_share(split.experts, E, chunks, parts, distinct)
        token_share = busiest_tokens(E, K, parts, T) if split.experts == "whole" and T > 1 else read_share
        work = _scaled(experts_work(self._manifest, layer, T * K, distinct), read_share, token_share)
        routed = T if split.exchange == "allreduce" or nodes.nodes == 1 else -(-T // nodes.nodes)
        router_s = phase_seconds(router_work(self._manifest, routed), nodes.rank_machine, 1.0)
        return phase_seconds(work, machine, self._shares.experts, weights_share) + router_s

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
        seconds = HALF_LAYER_S
        if nodes.ranks > 1:
            sums_bytes = 8 * T * self._config.model_dim * nodes.ranks
            seconds += NODE_SUM_S + sums_bytes / NODE_SUM_BYTES_PER_S
        return seconds


def phase_seconds(work: Work, machine: Machine, share: float, read_share: float = READ_SHARE) -> float:
    """The time of a phase that reaches these shares of the machine's arithmetic and reading, partly overlapped."""
    compute_s = (work.int8 / machine.int8 + work.f32 / machine.f32) / share
    return hypot(work.bytes / machine.read / read_share, compute_s)


def _read_share(found: MatrixFormat) -> float:
    return Q4_READ_SHARE if found.format == WeightFormat.Q4 else READ_SHARE


def _unlike_layers(manifest: Manifest) -> list[tuple[int, int]]:
    """The first of all layers of equal shapes and formats, and how many they are."""
    config, formats = manifest.config, manifest.formats.layers
    kinds = [(config.is_dense(layer), config.layer_hidden(layer), own) for layer, own in enumerate(formats)]
    return [(kinds.index(kind), count) for kind, count in Counter(kinds).items()]


def _scaled(work: Work, bytes_share: float, operations_share: float) -> Work:
    return Work(work.bytes * bytes_share, work.int8 * operations_share, work.f32 * operations_share)
