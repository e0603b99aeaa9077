"""`dist-moe plan`: memory, bytes on the wire and speed of a model on a number of nodes, before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from dist_moe.cli.config_file import option
from dist_moe.cli.counting import CountProgress
from dist_moe.cli.values import Number, OneOf, PathName, Whole, WholeRange, ends
from dist_moe.parallel.cpu_limits import own_cores
from dist_moe.parallel.launcher import detect_launcher

if TYPE_CHECKING:
    from dist_moe.engine.planning.planning import Ranks, Workload
    from dist_moe.engine.planning.prediction import Nodes
    from dist_moe.store.manifest import Manifest

MOST_NODES = 1024
MOST_RANKS = 1024  # of a node: more than it has cores
DEFAULT_NODES = 8
DEFAULT_CONTEXT = 4096
START_TIMEOUT_S = 60.0
STALL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class PlanOptions:
    """As parsed; None means: decided later."""

    model: str
    nodes: str | None
    ranks_per_node: int
    threads: int | None
    net: str
    bandwidth: float | None
    memory: float | None
    quant: str | None
    kv: str
    ctx: int | None
    prompt: int
    batch: int
    prefill_chunk: int
    format: str

    @property
    def read(self) -> float | None:
        """Bytes/s of a node."""
        return None if self.bandwidth is None else self.bandwidth * 1e9

    @property
    def memory_bytes(self) -> int:
        """Of a node; 0 if it was not given."""
        return 0 if self.memory is None else int(self.memory * 1e9)


@click.command()
@click.argument("model", metavar="MODEL", type=PathName())
@option(
    "--nodes",
    type=WholeRange(1, MOST_NODES),
    metavar="N|A-B",
    show_default="1-8; with --net measured up to the hosts of the job",
    help="How many nodes: one number, or a range to compare.",
)
@option(
    "--ranks-per-node",
    type=Whole(min=1, max=MOST_RANKS),
    default=1,
    help="MPI ranks on each node; with --net measured the job's.",
)
@option(
    "--threads",
    type=Whole(min=1, max=1024),
    show_default="this machine's cores / ranks per node",
    help="Threads of each rank.",
)
@option(
    "--net",
    type=OneOf(["1gbe", "10gbe", "ib100", "measured"]),
    default="1gbe",
    help="What connects the nodes; measured: between the hosts of this mpirun job.",
)
@option(
    "--bandwidth",
    metavar="GB/S",
    type=Number(min=0.1, max=100_000),
    show_default="measured on this machine",
    help="How fast a node reads its memory.",
)
@option(
    "--memory",
    metavar="GB",
    type=Number(min=0.001, max=10_000_000),
    show_default="what this machine has free",
    help="What a node can hold.",
)
@option(
    "--quant",
    type=OneOf(["f32", "bf16", "q8", "q4"]),
    show_default="as a run would pack it; a store has its own",
    help="Format of the weights.",
)
@option("--kv", type=OneOf(["f32", "f16", "q8"]), default="f16", help="Format of the KV cache.")
@option(
    "--ctx",
    type=Whole(min=1, max=2**31 - 1),
    show_default=f"{DEFAULT_CONTEXT}, at most the model's maximum",
    help="Positions that the KV cache holds.",
)
@option("--prompt", type=Whole(min=1, max=1 << 24), default=512, help="Tokens of the prompt.")
@option("--batch", type=Whole(min=1, max=16), default=1, help="Sequences that decode together.")
@option("--prefill-chunk", type=Whole(min=1, max=65536), default=256, help="Prompt tokens of a step at most.")
@option("-o", "--format", type=OneOf(["md", "json"]), default="md", help="Form of the report.")
def plan(**values: object) -> None:
    """Predict what a model needs and how fast it runs on a number of nodes; nothing is loaded.

    MODEL is a store, a Hugging Face directory, a GGUF or QW3W file or a file of configs/.

    \b
    Examples:
      dist-moe plan configs/qwen3-30b-a3b.toml --nodes 1-4 --net 10gbe
      dist-moe plan store/ --nodes 4 --memory 16 --bandwidth 25
      mpirun -f hosts dist-moe plan store/ --net measured
    """  # noqa: D301  click wants the character
    options = PlanOptions(**values)  # type: ignore[arg-type]
    if options.net == "measured":
        _plan_on_hosts(options)
    elif detect_launcher(os.environ).is_first:
        click.echo(_plan_like_this(options))


def _plan_like_this(options: PlanOptions) -> str:
    """For nodes like this machine, but for what the options say."""
    from dist_moe.engine.planning.plan_machine import measure_machine
    from dist_moe.engine.planning.planning import Ranks
    from dist_moe.engine.planning.prediction import Nodes
    from dist_moe.engine.start.available_memory import available_memory
    from dist_moe.parallel.cost import PRESET_LINKS
    from dist_moe.store.described import describe_model

    manifest = describe_model(options.model, options.quant)
    cores, per_node = len(own_cores()), options.ranks_per_node
    memory_bytes = options.memory_bytes or available_memory().available_bytes
    threads = options.threads or max(1, cores // per_node)
    asked = _checked(options, manifest, Ranks(1, per_node, threads), DEFAULT_NODES, memory_bytes)
    machine, isa = measure_machine(min(cores, per_node * threads), manifest.format, options.read)
    nodes = Nodes(1, per_node, threads, machine, PRESET_LINKS[options.net], isa)
    return _report(options, manifest, nodes, asked)


def _plan_on_hosts(options: PlanOptions) -> None:
    """For the hosts of this job, all ranks of which measure."""
    from dist_moe.engine.planning.plan_machine import measure_hosts
    from dist_moe.engine.planning.planning import Ranks
    from dist_moe.engine.start.job import Job
    from dist_moe.kernels import WeightFormat
    from dist_moe.store.described import describe_model

    job = Job(options.threads, START_TIMEOUT_S, lambda _: STALL_TIMEOUT_S)
    try:
        manifest = job.on_leader(lambda: describe_model(options.model, options.quant))
        fmt = WeightFormat.parse(job.of_leader(manifest.format.label if manifest else ""))
        hosts = measure_hosts(job, options.threads, fmt, options.read)

        def tell() -> None:
            assert manifest is not None
            nodes, memory_bytes = hosts.nodes, options.memory_bytes or hosts.memory_bytes
            asked = _checked(options, manifest, Ranks.of(nodes), nodes.nodes, memory_bytes)
            click.echo(_report(options, manifest, nodes, asked))

        job.on_leader(tell)
    finally:
        job.leave()


@dataclass(frozen=True)
class _Asked:
    """What is to be predicted: numbers of nodes, the work, and what a node can hold."""

    counts: range
    workload: Workload
    memory_bytes: int


def _checked(options: PlanOptions, manifest: Manifest, ranks: Ranks, most_nodes: int, memory_bytes: int) -> _Asked:
    """What the options ask for; UsageError if it cannot run."""
    from dist_moe.engine.planning.planning import check_request

    asked = _Asked(_node_counts(options, manifest, most_nodes), _workload(options, manifest), memory_bytes)
    check_request(manifest, ranks, asked.counts, asked.workload, memory_bytes)
    return asked


def _workload(options: PlanOptions, manifest: Manifest) -> Workload:
    from dist_moe.engine.planning.planning import Workload
    from dist_moe.engine.start.memory import Demand
    from dist_moe.kernels import KvFormat

    context = options.ctx or min(DEFAULT_CONTEXT, manifest.config.max_positions)
    demand = Demand(KvFormat.parse(options.kv), context, options.prefill_chunk)
    return Workload(demand, options.prompt, options.batch)


def _node_counts(options: PlanOptions, manifest: Manifest, most: int) -> range:
    """The numbers of nodes to look at; `most` where the options do not say."""
    if options.nodes is not None:
        first, last = ends(options.nodes)
        return range(first, last + 1)
    return range(1, min(most, manifest.config.heads) + 1)


def _report(options: PlanOptions, manifest: Manifest, nodes: Nodes, asked: _Asked) -> str:
    from dist_moe.cli.plan_output import Facts, render
    from dist_moe.engine.planning.planning import make_report

    progress = CountProgress("predicting number of nodes")
    report = make_report(manifest, nodes, asked.counts, asked.workload, asked.memory_bytes, progress)
    return render(options.format, report, Facts(manifest, nodes, asked.memory_bytes, options.net))
