"""What `dist-moe plan` predicts against what `dist-moe bench` measures, case by case.

    python benchmarks/predictions.py --stores DIR [--only WORD] [--wrap "nice -n -5"] [--json FILE]

Each group is one run of bench on a model of random weights, written once into DIR. The prediction takes from that run
the machine's figures alone (bandwidth of the reading loop, arithmetic of our matmul in the L1 cache and of bare f32)
and, over several hosts, what `dist-moe plan --net measured` found of the network just before; hosts are network
namespaces (tests/helpers/cluster.py). Nothing is fitted to a case: what the kernels make of these figures are
the constants in dist_moe/engine/planning/prediction.py.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from on_hosts import ARCHITECTURE, call, synthetic_bench, synthetic_store

from dist_moe.engine.measuring.bench_bound import Machine
from dist_moe.engine.planning.prediction import Nodes, Predictor, Split
from dist_moe.kernels import KvFormat
from dist_moe.parallel.cost import PRESET_LINKS, ExchangeKind, LinkCosts
from dist_moe.store.manifest import read_manifest

CHUNK = 256
Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """One run of bench."""

    name: str
    cases: tuple[str, ...]  # bench's options
    layers: int = 12
    quant: str = "q4"
    ranks: int = 1
    threads: int = 2
    experts: str = "auto"
    exchange: ExchangeKind = "allreduce"
    hosts: int = 1
    rate: str | None = None  # of a host's link, as tc writes it

    @property
    def store(self) -> str:
        """The name of its store."""
        return synthetic_store(self.layers, self.quant)

    def bench(self, stores: Path) -> list[str]:
        """Its command line."""
        words = synthetic_bench(stores, self.layers, self.quant)
        words += ["--threads", str(self.threads), "--experts", self.experts, "--exchange", self.exchange]
        return [*words, "--read-gib", "1", "--prefill-chunk", str(CHUNK), *self.cases]


DECODE = ("--prefill", "0", "--decode", "12", "--depth", "0,4000", "--batch", "1")
BATCHES = ("--prefill", "0", "--decode", "6", "--depth", "0", "--batch", "4,16")
PREFILL = ("--prefill", "32,128,256,512", "--decode", "0")
MIXED = ("--prefill", "64,256", "--decode", "10", "--depth", "0", "--batch", "1,8")
WIRED = ("--prefill", "256", "--decode", "10", "--depth", "0", "--batch", "1", "--repeat", "2")

GROUPS = (
    Group("1 thread", DECODE, threads=1),
    Group("1 thread, prefill", ("--prefill", "32,256", "--decode", "0"), threads=1),
    Group("2 threads", DECODE),
    Group("2 threads, batches", BATCHES),
    Group("2 threads, prefill", PREFILL),
    Group("2 ranks", MIXED, ranks=2, threads=1),
    Group("2 ranks, whole experts", MIXED, ranks=2, threads=1, experts="whole"),
    Group("4 layers", MIXED, layers=4),
    Group("4 layers, q8", MIXED, layers=4, quant="q8"),
    Group("4 layers, q8, 1 thread", MIXED, layers=4, quant="q8", threads=1),
    Group("2 hosts", MIXED, ranks=2, threads=1, experts="whole", hosts=2),
    Group("2 hosts, 1 Gbit/s", WIRED, ranks=2, threads=1, experts="whole", hosts=2, rate="1gbit"),
    Group(
        "2 hosts, 1 Gbit/s, alltoall",
        WIRED,
        ranks=2,
        threads=1,
        experts="whole",
        exchange="alltoall",
        hosts=2,
        rate="1gbit",
    ),
)


def run(group: Group, stores: Path, wrap: Sequence[str]) -> tuple[list[Row], LinkCosts]:
    """Bench's rows, and what the network was measured to take just before."""
    link = PRESET_LINKS["1gbe"]
    command = group.bench(stores)
    with ExitStack() as stack:
        start: tuple[str, ...] = ("mpirun", "-n", str(group.ranks)) if group.ranks > 1 else ()
        environment = None
        if group.hosts > 1:
            from helpers.cluster import Cluster

            cluster = stack.enter_context(Cluster(group.hosts, rate=group.rate))
            each = (group.ranks // group.hosts,) * group.hosts
            start, environment = cluster.mpirun_words(each), cluster.environment()
            probe = [sys.executable, "-m", "dist_moe", "plan", str(ARCHITECTURE), "--net", "measured", "-o", "json"]
            found = json.loads(call([*wrap, *start, *probe, "--bandwidth", "20", "--memory", "999"], environment)[0])
            link = LinkCosts(found["latency_us"] * 1e-6, found["link_gb_s"] * 1e9)
        return json.loads(call([*wrap, *start, *command], environment)[0]), link


def predict(group: Group, row: Row, link: LinkCosts, stores: Path) -> float:
    """Tokens per second of a row, from its machine's figures."""
    manifest = read_manifest(stores / group.store / "manifest.json")
    each = 1 / group.hosts
    machine = Machine(row["read_gb_s"] * 1e9 * each, row["matmul_gops"] * 1e9 * each, row["f32_gops"] * 1e9 * each)
    nodes = Nodes(group.hosts, group.ranks // group.hosts, group.threads, machine, link, row["isa"])
    shared = row["experts"] == "shared"
    split = Split(row["experts"], shared or nodes.ranks == 1, group.exchange)
    predictor = Predictor(manifest, KvFormat.parse(row["kv"]), nodes, split)
    if row["test"] == "prefill":
        return row["tokens"] / predictor.prefill(row["tokens"], CHUNK).seconds
    return row["batch"] / predictor.decode(row["depth"] + row["tokens"] // 2, row["batch"]).seconds


def compare(group: Group, stores: Path, rows: Sequence[Row], link: LinkCosts) -> Iterator[Row]:
    """Bench's rows with what is predicted for them."""
    for row in rows:
        predicted = predict(group, row, link, stores)
        found = {"predicted": predicted, "error": predicted / row["tokens_per_s"] - 1}
        net = {"latency_us": link.latency_s * 1e6, "link_mb_s": link.bytes_per_s / 1e6}
        yield {"group": group.name, **row, **found, **(net if group.hosts > 1 else {})}


def earlier(path: Path, group: Group) -> tuple[list[Row], LinkCosts]:
    """What an earlier call of this program wrote for a group, as `run` gives it."""
    rows = [row for row in json.loads(path.read_text()) if row["group"] == group.name]
    nets = [LinkCosts(row["latency_us"] * 1e-6, row["link_mb_s"] * 1e6) for row in rows if "latency_us" in row]
    return rows, nets[0] if nets else PRESET_LINKS["1gbe"]


def line(row: Row) -> str:
    """A line of the table."""
    case = (
        f"{row['test']} {row['tokens']}"
        if row["test"] == "prefill"
        else f"decode {row['batch']} x, depth {row['depth']}"
    )
    net = f"{row['latency_us']:.0f} us, {row['link_mb_s']:.0f} MB/s" if "link_mb_s" in row else ""
    return (
        f"| {row['group']} | {case} | {row['read_gb_s']:.1f} | {row['matmul_gops']:.0f} | {net} "
        f"| {row['predicted']:.1f} | {row['tokens_per_s']:.1f} | {row['error']:+.1%} |"
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", type=Path, required=True, help="where the stores are, or are written")
    parser.add_argument("--only", default="", help="only groups whose name holds this word")
    parser.add_argument("--wrap", default="", help="words before each command")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    parser.add_argument("--again", type=Path, help="do not measure, predict what was measured for such a file")
    options = parser.parse_args()
    rows: list[Row] = []
    print("| group | case | GB/s | GOPS | link | predicted tokens/s | measured | error |")
    print("|---|---|--:|--:|---|--:|--:|--:|")
    for group in GROUPS:
        if options.only not in group.name:
            continue
        if options.again:
            measured, link = earlier(options.again, group)
        else:
            measured, link = run(group, options.stores, shlex.split(options.wrap))
        for row in compare(group, options.stores, measured, link):
            rows.append(row)
            print(line(row), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    errors = [abs(row["error"]) for row in rows]
    within = sum(error <= 0.2 for error in errors)
    print(f"\n{within} of {len(errors)} within 20 %, median error {median(errors):.1%}, largest {max(errors):.1%}")


if __name__ == "__main__":
    main()
