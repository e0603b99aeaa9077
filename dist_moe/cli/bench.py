"""`dist-moe bench`: how fast a model runs here, and how fast the machine would let it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dist_moe.checkpoint.model_toml import read_model_toml
from dist_moe.cli import config_file
from dist_moe.cli.bench_output import Facts, render
from dist_moe.cli.config_file import flag, option
from dist_moe.cli.job import Setting, run_job
from dist_moe.cli.models import find_model
from dist_moe.cli.options import BenchOptions, model_options
from dist_moe.cli.ranks_table import ranks_table
from dist_moe.cli.values import Number, OneOf, PathName, Whole, WholeList, numbers
from dist_moe.engine.bench import LARGEST_SHARE, Bench, BenchPlan, BenchReport, Case
from dist_moe.engine.runtime import Runtime
from dist_moe.errors import BoundError, UsageError
from dist_moe.kernels import BLOCK_POSITIONS, KvFormat, WeightFormat
from dist_moe.model_config import ModelConfig, round_up
from dist_moe.store.models import ModelSource, synthetic_source
from dist_moe.store.synthetic import synthetic_model

DEFAULT_DEPTHS = (0, 4096)
LONGEST = 1 << 24


@dataclass(frozen=True)
class BenchTask:
    """A checked plan and what becomes of its report."""

    plan: BenchPlan
    format: str
    interrupted: Callable[[], bool]
    start_s: float  # from the process's begin until the task was made, before any weight was read
    stats: bool = False

    @property
    def context(self) -> int:
        """Positions of all sequences of the largest case together."""
        return max(case.batch * round_up(case.depth + case.tokens, BLOCK_POSITIONS) for case in self.plan.cases)

    def lead(self, engine: Runtime) -> None:
        """Measure and print.

        Raises:
            BoundError: A figure is better than the machine allows.
            Interrupted: By Ctrl-C.
        """
        report = Bench(engine, self.plan, _show, self.interrupted).run()
        click.echo(render(self.format, report, Facts.of(engine, self.plan, self.start_s)))
        if self.stats:
            click.echo("\n".join(ranks_table(engine.accounts(), engine.hosts)), err=True)
        refuse_impossible(report)


def refuse_impossible(report: BenchReport) -> None:
    """Raise BoundError unless every share is one that can be."""
    share, case = report.worst_share()
    if share > LARGEST_SHARE:
        raise BoundError(
            f"{case.test} of {case.tokens} tokens, batch {case.batch}, depth {case.depth}: {share:.0%} of what the "
            f"machine allows, which cannot be (the limit is {LARGEST_SHARE:.0%}): the machine was slower while it was "
            "measured than during the run, its caches hold the weights, or bytes are counted that no step reads; "
            "repeat on an idle machine, with a model larger than the caches, and report it if it stays"
        )


def make_task(options: BenchOptions, setting: Setting) -> BenchTask:
    """Check the plan before any weight is read.

    Raises:
        UsageError: There is nothing to measure, or the model or a step has no room for it.
    """
    plan = BenchPlan(
        cases=plan_cases(options, setting.config),
        repetitions=options.repeat,
        read_bytes=int(options.read_gib * (1 << 30)),
        prefill_chunk=options.prefill_chunk,
        kv=KvFormat.parse(options.kv),
        seed=options.seed,
    )
    return BenchTask(plan, options.format, setting.interrupted, process_seconds(), options.stats)


def plan_cases(options: BenchOptions, config: ModelConfig) -> tuple[Case, ...]:
    """The lines of the table: every prefill size, then every depth for every batch.

    Raises:
        UsageError: As `make_task`.
    """
    sizes, batches = [size for size in numbers(options.prefill) if size], numbers(options.batch)
    room = config.max_positions - options.decode
    wanted = DEFAULT_DEPTHS if options.depth is None else numbers(options.depth)
    depths = [depth for depth in wanted if depth <= room or options.depth is not None]
    step_tokens = max(options.prefill_chunk, 16)
    if max(batches) > step_tokens:
        raise UsageError(f"--batch {max(batches)}: a step has at most {step_tokens} tokens: raise --prefill-chunk")
    cases = [Case("prefill", size, 1, 0) for size in sizes]
    if options.decode:
        cases += [Case("decode", options.decode, batch, depth) for batch in batches for depth in depths]
    for case in cases:
        if case.depth + case.tokens > config.max_positions:
            raise UsageError(
                f"{case.test} of {case.tokens} tokens at depth {case.depth}: the model has {config.max_positions} "
                "positions: lower --prefill, --decode or --depth"
            )
    if not cases:
        raise UsageError("there is nothing to measure: give --prefill or --decode more than 0 tokens")
    return tuple(cases)


def find(options: BenchOptions) -> ModelSource:
    """The model of -m, or the one of random weights that --synthetic describes.

    Raises:
        UsageError: Options contradict each other, or the model has fewer layers than --layers.
        CheckpointError: The file describes no model that dist-moe runs.
    """
    if options.synthetic is None:
        for name, value in (("--layers", options.layers), ("--synthetic-dir", options.synthetic_dir)):
            if value is not None:
                raise UsageError(f"{name} belongs to --synthetic FILE.toml, which is not given")
        return find_model(options)
    if options.model is not None:
        raise UsageError("-m and --synthetic exclude each other: give one of them")
    path = Path(options.synthetic)
    model = synthetic_model(read_model_toml(path), path.stem, options.layers)
    fmt = WeightFormat.parse(options.quant or "q4")
    return synthetic_source(model, fmt, options.synthetic_dir)


def process_seconds() -> float:
    """How long this process has been running, as the system knows it; 0 where it does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _show(what: str) -> None:
    click.echo(f"measuring {what}", err=True)


@click.command()
@model_options
@option(
    "--synthetic",
    type=PathName(),
    metavar="FILE.toml",
    show_default=False,
    help="Instead of -m: a model of random weights in --quant, with the architecture of a file in configs/. It is "
    "written once, at the disk's speed, into the cache directory.",
)
@option(
    "--layers",
    type=Whole(min=1, max=100_000),
    show_default="all",
    help="With --synthetic: only so many of its layers.",
)
@option(
    "--synthetic-dir",
    type=PathName(),
    metavar="DIR",
    show_default="in the cache directory",
    help="With --synthetic: the directory of its store.",
)
@option(
    "--prefill",
    type=WholeList(0, LONGEST),
    metavar="N,N",
    default="256,2048",
    help="Prompt lengths to measure, one sequence each; 0 for none.",
)
@option("--decode", type=Whole(min=0, max=LONGEST), default=64, help="Tokens that each sequence decodes; 0 for none.")
@option(
    "--depth",
    type=WholeList(0, LONGEST),
    metavar="N,N",
    show_default="0,4096, as far as the model goes",
    help="Positions that are filled (with random keys and values) before a decode begins.",
)
@option("--batch", type=WholeList(1, 65536), metavar="N,N", default="1", help="How many sequences decode together.")
@option("--repeat", type=Whole(min=1, max=10000), default=3, help="Repetitions; medians are shown.")
@option(
    "--read-gib",
    type=Number(min=0.001, max=1024),
    default=4.0,
    help="GiB that each host reads in a pass to find its read bandwidth; more than the caches hold.",
)
@option("--seed", type=Whole(min=0, max=2**31 - 1), default=0, help="Of the random tokens.")
@flag(
    "--stats",
    "Print, on stderr, what each rank computed, waited for and sent in all steps of the measurements together.",
)
@option("-o", "--format", type=OneOf(["md", "json", "csv"]), default="md", help="Form of the table.")
@click.pass_context
def bench(context: click.Context, /, config: str | None, print_config: bool, **values: Any) -> None:
    """Measure prefill and decode of a model, each as a share of what this machine allows.

    The machine is measured in the same run, by all ranks at once: how fast it reads memory and how many int8 operations
    it does. The share is the least time that reading the step's weights and KV cache, and its operations, can take,
    over the time that was measured. Tokens are random.
    """
    options = BenchOptions(**values)
    if print_config:
        config_file.print_config(context, {})
        return
    run_job(options, make_task, find)
