"""`dist-moe plan`: for a model and numbers of nodes, what each way to split the work needs and how fast it will be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dist_moe import files
from dist_moe.checkpoint.model_toml import read_model_toml
from dist_moe.checkpoint.source import open_source
from dist_moe.engine.memory import Demand, MemoryNeed, host_need
from dist_moe.engine.prediction import Nodes, Predictor, Split, StepCost
from dist_moe.engine.record import show_bytes
from dist_moe.errors import UsageError
from dist_moe.kernels import WeightFormat
from dist_moe.model.step import MAX_LOGIT_ROWS
from dist_moe.parallel.cost import EXCHANGES, ExchangeKind
from dist_moe.parallel.plan import plan_job
from dist_moe.store.manifest import MANIFEST_NAME, Manifest, read_manifest
from dist_moe.store.models import find_model
from dist_moe.store.plan import StoreOptions, plan_store
from dist_moe.store.synthetic import synthetic_model

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


def describe_model(model: str, quant: str | None) -> Manifest:
    """What a model's store is, or would be, without reading a weight.

    Args:
        model: A store, a Hugging Face directory, a GGUF file or a file of configs/.
        quant: The format of the weights, where it is not decided yet.

    Raises:
        UsageError: The path is none of them, or `quant` contradicts the store.
        CheckpointError, StoreError: The model's files are damaged or not supported.
    """
    path = Path(model)
    if path.suffix == ".toml" and files.is_file(path):
        fmt = WeightFormat.parse(quant or "q4")
        plan = plan_store(synthetic_model(read_model_toml(path), path.stem, None), StoreOptions(format=fmt))
        return replace(plan, source_name=path.stem)
    source = find_model(model, quant, "")
    if source.format is None:
        return read_manifest(source.path / MANIFEST_NAME)
    return plan_store(open_source(source.path), StoreOptions(format=source.format))


def check_request(manifest: Manifest, ranks: int, counts: Sequence[int], workload: Workload) -> None:
    """Refuse what no machine could run.

    Raises:
        UsageError: There are more ranks than heads, or the context does not fit the model or the prompt.
    """
    config = manifest.config
    if counts[-1] * ranks > config.heads:
        raise UsageError(
            f"--nodes {counts[-1]} x --ranks-per-node {ranks}: {counts[-1] * ranks} ranks are more than the model's "
            f"{config.heads} query heads, and each rank needs at least one: lower one of them"
        )
    context = workload.demand.context
    if context > config.max_positions:
        raise UsageError(f"--ctx {context}: the model has {config.max_positions} positions; give at most that")
    if workload.prompt >= context:
        raise UsageError(f"--prompt {workload.prompt}: leaves no room to answer in {context} positions: raise --ctx")


def make_report(
    manifest: Manifest, machine: Nodes, counts: Sequence[int], workload: Workload, memory_bytes: int
) -> PlanReport:
    """Predict every way on each number of nodes.

    Args:
        manifest: Of the model.
        machine: A node, its ranks and the link; the number of nodes is ignored.
        counts: Numbers of nodes, ascending.
        workload: What to run.
        memory_bytes: What a node can hold; 0 is not known.

    Raises:
        UsageError: The model fits on none of these numbers of nodes, or has too few heads or positions.
    """
    check_request(manifest, machine.ranks, counts, workload)
    ways, best, too_small = [], [], []
    for count in counts:
        nodes = replace(machine, nodes=count)
        fits = [way for way in _ways(manifest, nodes, workload) if _fits(way.need, memory_bytes)]
        if fits:
            ways += fits
            best.append(min(fits, key=lambda way: way.request_seconds))
        else:
            too_small.append((count, least_need(manifest, nodes, workload).full_bytes))
    if not best:
        raise UsageError(_too_large(manifest, machine, counts, workload, memory_bytes))
    return PlanReport(tuple(ways), tuple(best), tuple(too_small))


def least_need(manifest: Manifest, nodes: Nodes, workload: Workload) -> MemoryNeed:
    """Memory of the node that needs most, in the layout that needs least."""
    layouts = ("shared",) if nodes.nodes == 1 else ("whole", "sliced")
    return min((node_need(manifest, nodes, layout, workload) for layout in layouts), key=lambda need: need.full_bytes)


def node_need(manifest: Manifest, nodes: Nodes, layout: str, workload: Workload) -> MemoryNeed:
    """Memory of the node that needs most."""
    threads = [nodes.threads] * nodes.ranks
    demand = replace(workload.demand, step_tokens=max(workload.demand.step_tokens, MAX_LOGIT_ROWS))
    node_of_rank = [rank // nodes.ranks for rank in range(nodes.all_ranks)]
    job = plan_job(manifest.config, manifest.group_size, layout, node_of_rank=node_of_rank)
    needs = (host_need(manifest, job.of_node(node), threads, demand) for node in range(nodes.nodes))
    return max(needs, key=lambda need: need.full_bytes)


def _ways(manifest: Manifest, nodes: Nodes, workload: Workload) -> Iterator[Way]:
    """On one node ranks share what it owns; on several, nodes own whole or sliced experts."""
    exchanges: tuple[ExchangeKind, ...] = EXCHANGES[:1] if nodes.nodes == 1 else EXCHANGES
    chunk = workload.demand.step_tokens
    for layout in ("shared",) if nodes.nodes == 1 else ("whole", "sliced"):
        predictors = {
            exchange: Predictor(manifest, workload.demand.kv, nodes, Split(layout, True, exchange))
            for exchange in exchanges
        }
        decode = {name: one.decode(workload.prompt, workload.batch) for name, one in predictors.items()}
        prefill = {name: one.prefill(workload.prompt, chunk) for name, one in predictors.items()}
        yield Way(nodes.nodes, layout, node_need(manifest, nodes, layout, workload), decode, prefill, workload)


def _fits(need: MemoryNeed, memory_bytes: int) -> bool:
    return memory_bytes == 0 or need.full_bytes <= memory_bytes


def _too_large(manifest: Manifest, machine: Nodes, counts: Sequence[int], workload: Workload, memory_bytes: int) -> str:
    """One sentence: what does not fit, and how many nodes would do."""
    most = replace(machine, nodes=counts[-1])
    need = least_need(manifest, most, workload)
    shown = f"{counts[-1]} node{'s' if counts[-1] > 1 else ''} of {show_bytes(memory_bytes)}"
    enough = _enough_nodes(manifest, machine, workload, memory_bytes)
    advice = f"take --nodes {enough}" if enough else "no number of nodes is enough: take nodes with more memory"
    return (
        f"{manifest.source_name} in {manifest.format.label} does not fit on {shown}: each needs "
        f"{show_bytes(need.full_bytes)} (weights {show_bytes(need.weights_bytes)}, KV cache "
        f"{show_bytes(need.kv_bytes)}, buffers {show_bytes(need.buffer_bytes)}); {advice}, fewer bits (--quant), a "
        "shorter --ctx or --kv q8"
    )


def _enough_nodes(manifest: Manifest, machine: Nodes, workload: Workload, memory_bytes: int) -> int:
    """The least number of nodes that hold the model; 0 if none does."""
    for count in range(1, manifest.config.heads // machine.ranks + 1):
        if _fits(least_need(manifest, replace(machine, nodes=count), workload), memory_bytes):
            return count
    return 0
