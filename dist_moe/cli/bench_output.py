"""The table of `dist-moe bench`: Markdown for people, JSON and CSV for programs, of the same rows."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from statistics import median
from typing import Any

from dist_moe.engine.bench import FIRST_PROMPT_TOKENS, BenchPlan, BenchReport, Limits, Timing
from dist_moe.engine.measuring.bench_machine import ReadSpeed
from dist_moe.engine.runtime import Runtime

Row = dict[str, Any]

# Weights in small pages are worth a word from here on.
_MOST_IN_HUGE_PAGES = 0.9
_WORTH_TELLING = 1.05


@dataclass(frozen=True)
class Facts:
    """What ran: it stands in every row."""

    model: str
    weights: str
    kv: str
    isa: str
    mpi: str
    experts: str
    ranks: int
    hosts: int
    threads: int
    prefill_chunk: int
    start_s: float  # of the process until the model was opened

    @classmethod
    def of(cls, engine: Runtime, plan: BenchPlan, start_s: float) -> Facts:
        """Ask an engine."""
        manifest, world = engine.model.weights.store.manifest, engine.model.exchange.world
        return cls(
            model=manifest.source_name,
            weights=f"{manifest.label} g{manifest.group_size}" if manifest.formats.quantized else manifest.label,
            kv=plan.kv.label,
            isa=engine.kernels.isa,
            mpi=world.library,
            experts=engine.layout,
            ranks=world.size,
            hosts=world.nodes,
            threads=engine.kernels.threads,
            prefill_chunk=plan.prefill_chunk,
            start_s=start_s,
        )


def render(form: str, report: BenchReport, facts: Facts) -> str:
    """The report as text, without a newline at its end.

    Args:
        form: "md", "json" (a list of objects) or "csv".
        report: What was measured.
        facts: What ran.
    """
    rows = [_row(timing, report, facts) for timing in report.timings]
    if form == "json":
        return json.dumps(rows, indent=1)
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().rstrip("\n")
    return "\n".join([*_table(rows), "", *_warnings(rows, report), *_machine_lines(rows[0], report.limits)])


def _row(timing: Timing, report: BenchReport, facts: Facts) -> Row:
    """One line of the table; rates are per second, shares are of what the machine allows."""
    seconds, limits = median(timing.seconds), report.limits
    machine, total, steps = limits.machine, timing.total, len(timing.steps)
    rates = [timing.tokens_per_s(one) for one in timing.seconds]
    row: Row = {
        "test": timing.case.test,
        "tokens": timing.case.tokens,
        "batch": timing.case.batch,
        "depth": timing.case.depth,
        "ranks": facts.ranks,
        "threads": facts.threads,
        "tokens_per_s": timing.tokens_per_s(seconds),
        "tokens_per_s_min": min(rates),
        "tokens_per_s_max": max(rates),
        "repetitions": len(rates),
        "steps": steps,
        "step_ms": seconds / steps * 1e3,
        "bytes_per_step": round(total.bytes / steps),
        "operations_per_step": round((total.int8 + total.f32) / steps),
        "picked_experts": timing.picked_experts,
        "disk_faults": timing.disk_faults,
        "read_share": total.bytes / seconds / machine.read,
        "compute_share": total.compute_seconds(machine) / seconds,
        "share": timing.share(machine),
        "overhead_ms": report.overhead_s * 1e3,
        "load_s": report.load_s,
        "huge_page_share": report.huge_share,
        "first_token_s": facts.start_s + report.load_s + report.first_step_s,
        "read_gb_s": limits.read.rate / 1e9,
        "read_source": limits.read.source,
        "read_bytes": limits.read.bytes,
        "int8_gops": limits.int8 / 1e9,
        "matmul_gops": limits.matmul / 1e9,
        "f32_gops": limits.f32 / 1e9,
        "hosts": facts.hosts,
        "model": facts.model,
        "weights": facts.weights,
        "kv": facts.kv,
        "isa": facts.isa,
        "experts": facts.experts,
        "prefill_chunk": facts.prefill_chunk,
        "mpi": facts.mpi,
    }
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def _table(rows: list[Row]) -> list[str]:
    """One line per row: tokens/s of all sequences together, then what a step reads and the three shares."""
    first = rows[0]
    lines = [
        f"{first['model']}, {first['weights']}, KV {first['kv']}, {first['isa']}, {first['ranks']} ranks x "
        f"{first['threads']} threads on {first['hosts']} hosts, experts {first['experts']}, MPI {first['mpi']}",
        "",
        "| test | tokens | batch | depth | tokens/s | min - max | ms/step | MB/step | experts | read "
        "| compute | share |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = (
            row["test"],
            row["tokens"],
            row["batch"],
            row["depth"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['tokens_per_s_min']:.1f} - {row['tokens_per_s_max']:.1f}",
            f"{row['step_ms']:.2f}",
            f"{row['bytes_per_step'] / 1e6:.0f}",
            f"{row['picked_experts']:.1f}",
            *(f"{row[name]:.1%}" for name in ("read_share", "compute_share", "share")),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _machine_lines(row: Row, limits: Limits) -> list[str]:
    """What the shares refer to, and what is not in the table."""
    return [
        f"The machine reads {row['read_gb_s']:.1f} GB/s ({_way(limits.read)}; {_other(limits.other_read)}) and does "
        f"{row['int8_gops']:.0f} GOPS of bare int8 dot products ({row['f32_gops']:.0f} in f32; our matmul in the L1 "
        f"cache {row['matmul_gops']:.0f}).",
        "read: bytes that a step must touch / its time / that bandwidth; compute: its operations likewise; share: the "
        "least time of its phases, the larger of both in each, over the time measured (medians).",
        f"Weights loaded in {row['load_s'] * 1e3:.0f} ms{_in_huge_pages(row)}; the first token of a prompt of "
        f"{FIRST_PROMPT_TOKENS} {row['first_token_s']:.2f} s after the process began; Python, calls and messages "
        f"{row['overhead_ms']:.2f} ms per decoded token (a step less its kernels, of a model of the same layers whose "
        "matrices are next to empty).",
    ]


def _warnings(rows: list[Row], report: BenchReport) -> list[str]:
    """What a reader must know before believing the table."""
    limits, share = report.limits, report.huge_share
    lines = []
    if share is not None and share < _MOST_IN_HUGE_PAGES and limits.memory_gain > _WORTH_TELLING:
        lines.append(
            f"Only {share:.0%} of rank 0's weights lie in huge pages of the page cache: something else than dist-moe "
            "read or wrote the files first, or their file system has none. Private memory is read "
            f"{limits.memory_gain - 1:.0%} faster, probably for that: evict the files (vmtouch -e DIRECTORY), or take "
            "--weights copy."
        )
    if any(row["disk_faults"] for row in rows):
        cases = ", ".join(f"{row['test']} {row['batch']} x {row['tokens']}" for row in rows if row["disk_faults"])
        lines.append(
            f"Weights were read from the disk while the clock ran ({cases}): the store is not, or does not fit, in the "
            "page cache; repeat, or free memory."
        )
    if limits.read.bytes < 0.9 * limits.wanted_bytes * rows[0]["hosts"]:
        lines.append(
            f"The store is small: its {limits.read.bytes / 2**30:.2f} GiB were read again and again, as a run reads "
            "them, from the caches where they hold it."
        )
    return lines


def _in_huge_pages(row: Row) -> str:
    share = row["huge_page_share"]
    return "" if share is None else f", {share:.0%} of them in huge pages"


def _where(speed: ReadSpeed) -> str:
    return "the store's mapped pages" if speed.source == "store" else "anonymous memory"


def _way(speed: ReadSpeed) -> str:
    ahead = f", prefetching {speed.ahead_bytes} bytes ahead" if speed.ahead_bytes else ""
    return f"{_where(speed)}, {speed.streams} streams per thread{ahead}"


def _other(speed: ReadSpeed) -> str:
    if not speed.bytes:
        return f"{_where(speed)} not measured: too little is free"
    return f"{_where(speed)} {speed.rate / 1e9:.1f} GB/s over {speed.bytes / 2**30:.1f} GiB"
