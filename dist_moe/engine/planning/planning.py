"""`dist-moe plan`: for a model and numbers of nodes, what each way to split the work needs and how fast it will be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dist_moe.engine.planning.prediction import Nodes, Predictor, Split, StepCost
from dist_moe.engine.start.memory import Demand, MemoryNeed, host_need
from dist_moe.engine.start.record import show_bytes
from dist_moe.errors import UsageError
from dist_moe.model.step import MAX_LOGIT_ROWS
from dist_moe.parallel.cost import EXCHANGES, ExchangeKind
from dist_moe.parallel.plan import JobPlan, Plan, plan_job
from dist_moe.store.manifest import Manifest

ANSWER_TOKENS = 256  # of the request whose time decides which way is best


@dataclass(frozen=True)
class Workload:
    """What the model shall do.

    Attributes:
        demand: Format of the KV cache, positions, tokens of a step at most.
        prompt: Tokens of a prompt; decoding goes on from there.
        batch: Sequences that decode together.
    """

    demand: Demand
    prompt: int
    batch: int


@dataclass(frozen=True)
class Ranks:
    """How many nodes, ranks on each of them, and threads of each rank."""

    nodes: int
    per_node: int
    threads: int

    @classmethod
    def of(cls, nodes: Nodes) -> Ranks:
        """The counts of some machines."""
        return cls(nodes.nodes, nodes.ranks, nodes.threads)


@dataclass(frozen=True)
class Way:
    """One way to split the experts over nodes, and what comes of it with each exchange; `auto` takes the quicker one.

    Attributes:
        nodes: How many.
        experts: "shared" on one node, else "whole" or "sliced" over nodes.
        need: Memory of the node that needs most.
        decode: One step, by exchange.
        prefill: All steps of the prompt, by exchange.
        workload: What was asked.
    """

    nodes: int
    experts: str
    need: MemoryNeed
    decode: Mapping[ExchangeKind, StepCost]
    prefill: Mapping[ExchangeKind, StepCost]
    workload: Workload

    @property
    def exchanges(self) -> tuple[ExchangeKind, ExchangeKind]:
        """The quicker exchange of decoding, and of prefill."""
        return quickest(self.decode), quickest(self.prefill)

    def decode_tokens_per_s(self, exchange: ExchangeKind | None = None) -> float:
        """Of all sequences together; None is `auto`."""
        return self.workload.batch / self.decode[exchange or quickest(self.decode)].seconds

    def prefill_tokens_per_s(self, exchange: ExchangeKind | None = None) -> float:
        """Of one prompt; None is `auto`."""
        return self.workload.prompt / self.prefill[exchange or quickest(self.prefill)].seconds

    @property
    def request_seconds(self) -> float:
        """A prompt, and ANSWER_TOKENS of each sequence after it."""
        decode, prefill = self.exchanges
        return self.prefill[prefill].seconds + ANSWER_TOKENS * self.decode[decode].seconds


def quickest(costs: Mapping[ExchangeKind, StepCost]) -> ExchangeKind:
    """The exchange that takes least; of equal ones the first."""
    return min(costs, key=lambda exchange: costs[exchange].seconds)


@dataclass(frozen=True)
class PlanReport:
    """What `plan` found.

    Attributes:
        ways: All that fit in memory, by nodes.
        best: For each number of nodes that fits, the quickest way.
        too_small: Numbers of nodes that do not fit, and the bytes that each of their nodes would need.
    """

    ways: tuple[Way, ...]
    best: tuple[Way, ...]
    too_small: tuple[tuple[int, int], ...]

    @property
    def winner(self) -> Way:
        """The quickest of all; of equal ones that with fewest nodes."""
        return min(self.best, key=lambda way: way.request_seconds)

    def slower_steps(self) -> Iterator[tuple[Way, Way]]:
        """Pairs (fewer nodes, next more nodes) of which the second one decodes slower."""
        for fewer, more in zip(self.best, self.best[1:], strict=False):
            if more.decode_tokens_per_s() < fewer.decode_tokens_per_s():
                yield fewer, more


def check_request(
    manifest: Manifest, ranks: Ranks, counts: Sequence[int], workload: Workload, memory_bytes: int
) -> None:
    """Refuse what cannot run, before anything is measured.

    Args:
        manifest: Of the model.
        ranks: On each node; their number of nodes is ignored.
        counts: Numbers of nodes, ascending.
        workload: What to run.
        memory_bytes: What a node can hold; 0 is not known.

    Raises:
        UsageError: The context does not fit the model or the prompt, or the model none of these numbers of nodes, or
            there are more nodes than query heads.
    """
    if counts[-1] > (heads := manifest.config.heads):
        raise UsageError(f"{counts[-1]} nodes: this model has {heads} query heads and each node needs one: take fewer")
    context, most = workload.demand.context, manifest.config.max_positions
    if context > most:
        raise UsageError(f"--ctx {context}: the model has {most} positions; give at most that")
    if workload.prompt >= context:
        raise UsageError(f"--prompt {workload.prompt}: leaves no room to answer in {context} positions: raise --ctx")
    # The most nodes first: if the model fits on them, the others need not be looked at.
    needs = (least_need(manifest, replace(ranks, nodes=count), workload) for count in reversed(counts))
    if not any(_fits(need, memory_bytes) for need in needs):
        most_nodes = least_need(manifest, replace(ranks, nodes=counts[-1]), workload)
        raise UsageError(_too_large(manifest, ranks, counts[-1], workload, memory_bytes, most_nodes))


def make_report(
    manifest: Manifest,
    machine: Nodes,
    counts: Sequence[int],
    workload: Workload,
    memory_bytes: int,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> PlanReport:
    """Predict every way on each number of nodes.

    Args:
        manifest: Of the model.
        machine: A node, its ranks and the link; the number of nodes is ignored.
        counts: Numbers of nodes, ascending; `check_request` found that the model fits on some of them.
        workload: What to run.
        memory_bytes: What a node can hold; 0 is not known.
        progress: Told (numbers of nodes that are done, all of them).
    """
    ways, best, too_small = [], [], []
    for done, count in enumerate(counts, 1):
        nodes = replace(machine, nodes=count)
        fits = [way for way in _ways(manifest, nodes, workload) if _fits(way.need, memory_bytes)]
        if fits:
            ways += fits
            best.append(min(fits, key=lambda way: way.request_seconds))
        else:
            too_small.append((count, least_need(manifest, Ranks.of(nodes), workload).full_bytes))
        progress(done, len(counts))
    return PlanReport(tuple(ways), tuple(best), tuple(too_small))


def least_need(manifest: Manifest, ranks: Ranks, workload: Workload) -> MemoryNeed:
    """Memory of the node that needs most, in the layout that needs least."""
    needs = (node_need(manifest, ranks, layout, workload) for layout in _layouts(ranks.nodes))
    return min(needs, key=lambda need: need.full_bytes)


def node_need(manifest: Manifest, ranks: Ranks, layout: str, workload: Workload) -> MemoryNeed:
    """Memory of the node that needs most."""
    demand = replace(workload.demand, step_tokens=max(workload.demand.step_tokens, MAX_LOGIT_ROWS))
    node_of_rank = [node for node in range(ranks.nodes) for _ in range(ranks.per_node)]
    job = plan_job(manifest.config, manifest.group_size, layout, node_of_rank=node_of_rank)
    threads = [ranks.threads] * ranks.per_node
    needs = (host_need(manifest, plans, threads, demand) for plans in _unlike_nodes(manifest, job))
    return max(needs, key=lambda need: need.full_bytes)


def _unlike_nodes(manifest: Manifest, job: JobPlan) -> Iterable[Sequence[Plan]]:
    """The plans of each node, but of nodes with equally many units of every kind only the first one's."""
    plans_of = [list[Plan]() for _ in range(job.nodes)]
    for plan in job.plans:
        plans_of[plan.node].append(plan)
    if manifest.formats.uniform_format is None:  # units of one kind are unequal
        return plans_of
    layers = range(manifest.config.layers)
    found: dict[tuple[object, ...], Sequence[Plan]] = {}
    for plans in plans_of:
        ranks = tuple((plan.rank == 0, len(plan.heads), len(plan.kv_heads), plan.vocabulary_rows) for plan in plans)
        kv_heads = {head for plan in plans for head in plan.kv_heads}
        chunks = tuple(sum(len(plan.readable_chunks(layer)) for plan in plans) for layer in layers)
        found.setdefault((ranks, len(kv_heads), chunks), plans)
    return found.values()


def _layouts(nodes: int) -> tuple[str, ...]:
    """On one node ranks share what it owns; on several, nodes own whole or sliced experts."""
    return ("shared",) if nodes == 1 else ("whole", "sliced")


def _ways(manifest: Manifest, nodes: Nodes, workload: Workload) -> Iterator[Way]:
    exchanges: tuple[ExchangeKind, ...] = EXCHANGES[:1] if nodes.nodes == 1 else EXCHANGES
    chunk = workload.demand.step_tokens
    for layout in _layouts(nodes.nodes):
        predictors = {
            exchange: Predictor(manifest, workload.demand.kv, nodes, Split(layout, True, exchange))
            for exchange in exchanges
        }
        decode = {name: one.decode(workload.prompt, workload.batch) for name, one in predictors.items()}
        prefill = {name: one.prefill(workload.prompt, chunk) for name, one in predictors.items()}
        need = node_need(manifest, Ranks.of(nodes), layout, workload)
        yield Way(nodes.nodes, layout, need, decode, prefill, workload)


def _fits(need: MemoryNeed, memory_bytes: int) -> bool:
    return memory_bytes == 0 or need.full_bytes <= memory_bytes


def _too_large(
    manifest: Manifest, ranks: Ranks, count: int, workload: Workload, memory_bytes: int, need: MemoryNeed
) -> str:
    """One sentence: what does not fit, and how many nodes would do."""
    enough = _enough_nodes(manifest, ranks, workload, memory_bytes)
    advice = f"take --nodes {enough}" if enough else "no number of nodes is enough: take larger ones"
    return (
        f"{manifest.source_name} in {manifest.label} does not fit on {count} node{'s' if count > 1 else ''} of "
        f"{show_bytes(memory_bytes)}: each needs {show_bytes(need.full_bytes)} (weights "
        f"{show_bytes(need.weights_bytes)}, KV cache {show_bytes(need.kv_bytes)}, buffers "
        f"{show_bytes(need.buffer_bytes)}); {advice}, fewer bits (--quant), a shorter --ctx or --kv q8"
    )


def _enough_nodes(manifest: Manifest, ranks: Ranks, workload: Workload, memory_bytes: int) -> int:
    """The least number of nodes that hold the model, at most one per query head; 0 if none does."""

    def holds(count: int) -> bool:
        return _fits(least_need(manifest, replace(ranks, nodes=count), workload), memory_bytes)

    few, enough = 0, manifest.config.heads
    if not holds(enough):
        return 0
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if holds(middle) else (middle, enough)
    return enough
