"""Whether `--exchange auto` picks the quicker exchange: cases over hosts, tokens of a step and rates of the network.

    python benchmarks/exchange_choice.py --stores DIR [--only WORD] [--wrap WORDS] [--json FILE]

The cases below were fixed before anything was measured. Each runs both exchanges in turn on hosts that are network
namespaces (tests/helpers/cluster.py), one rank and one thread each, and compares the quicker one with what `auto`
would have taken by the start-up probe of such a job. Cases whose times differ by less than 5 % do not count. With more
hosts than cores the computing of all hosts shares the cores, which slows both exchanges alike.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from on_hosts import ARCHITECTURE, call, synthetic_bench

from dist_moe.checkpoint.model_toml import read_model_toml
from dist_moe.parallel.cost import EXCHANGES, ExchangeKind, LinkCosts, WireShape, choose_exchange, exchange_table
from helpers.cluster import Cluster

LAYERS = 2
SMALLEST_MARGIN = 0.05
_PROBE = re.compile(r"between hosts takes ([0-9.]+) us and 1 s per ([0-9.]+) MB")


@dataclass(frozen=True)
class Case:
    """One step of `tokens` tokens (1: a decoded one, else a prompt) on some hosts; rate as tc writes it, None: bare."""

    hosts: int
    rate: str | None
    tokens: int


CASES = (
    *(Case(2, "1gbit", tokens) for tokens in (1, 2, 16, 256)),
    *(Case(2, "100mbit", tokens) for tokens in (1, 64)),
    *(Case(3, "1gbit", tokens) for tokens in (1, 2, 64)),
    *(Case(4, "1gbit", tokens) for tokens in (1, 2, 16, 256)),
    *(Case(4, "200mbit", tokens) for tokens in (1, 3, 64)),
    *(Case(2, None, tokens) for tokens in (1, 256)),
)


@dataclass(frozen=True)
class Outcome:
    """Seconds of both exchanges, and the one that auto takes."""

    case: Case
    seconds: dict[str, float]
    auto: ExchangeKind
    latency_us: float
    link_mb_s: float

    @property
    def winner(self) -> str:
        """The quicker exchange."""
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def margin(self) -> float:
        """How much longer the slower one takes."""
        return max(self.seconds.values()) / min(self.seconds.values()) - 1

    @property
    def counts(self) -> bool:
        """Whether the times differ enough."""
        return self.margin >= SMALLEST_MARGIN

    @property
    def right(self) -> bool:
        """Whether auto takes the quicker one."""
        return self.auto == self.winner


def measure(cases: list[Case], stores: Path, wrap: list[str]) -> list[Outcome]:
    """The cases of one cluster: both exchanges, each in one job over all token counts."""
    hosts, rate = cases[0].hosts, cases[0].rate
    seconds: dict[ExchangeKind, dict[int, float]] = {}
    link = LinkCosts(0, 1)
    for exchange in ("auto", *EXCHANGES):
        with Cluster(hosts, rate=rate) as cluster:
            start, environment = cluster.mpirun_words((1,) * hosts), cluster.environment({"DIST_MOE_THREADS": "1"})
            tokens = sorted({case.tokens for case in cases})
            if exchange == "auto":
                text = call([*wrap, *start, *bench(stores, [1], "auto"), "-v"], environment)[1]
                found = _PROBE.search(text)
                assert found is not None, text
                link = LinkCosts(float(found[1]) * 1e-6, float(found[2]) * 1e6)
                continue
            rows = json.loads(call([*wrap, *start, *bench(stores, tokens, exchange)], environment)[0])
            # A decode of one token stands for a step of one.
            seconds[exchange] = {1 if row["test"] == "decode" else row["tokens"]: row["step_ms"] * 1e-3 for row in rows}
    table = exchange_table(WireShape.of(read_model_toml(ARCHITECTURE), quantized=True), hosts, link)
    return [
        Outcome(
            case,
            {exchange: seconds[exchange][case.tokens] for exchange in EXCHANGES},
            choose_exchange(case.tokens, table),
            link.latency_s * 1e6,
            link.bytes_per_s / 1e6,
        )
        for case in cases
    ]


def bench(stores: Path, tokens: list[int], exchange: str) -> list[str]:
    """The command line of bench for steps of so many tokens."""
    words = synthetic_bench(stores, LAYERS, "q4")
    prefill = [count for count in tokens if count > 1]
    words += ["--prefill", ",".join(map(str, prefill)) or "0", "--prefill-chunk", "256", "--experts", "whole"]
    words += ["--decode", "8" if 1 in tokens else "0", "--depth", "0", "--batch", "1", "--repeat", "3"]
    return [*words, "--exchange", exchange, "--read-gib", "0.05"]


def line(outcome: Outcome) -> str:
    """A line of the table."""
    case, ms = outcome.case, {name: f"{value * 1e3:.1f}" for name, value in outcome.seconds.items()}
    verdict = ("right" if outcome.right else "WRONG") if outcome.counts else "too close"
    return (
        f"| {case.hosts} | {case.rate or 'bare'} | {outcome.latency_us:.0f} us, {outcome.link_mb_s:.0f} MB/s "
        f"| {case.tokens} | {ms['allreduce']} | {ms['alltoall']} | {outcome.winner} | {outcome.margin:.0%} "
        f"| {outcome.auto} | {verdict} |"
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", type=Path, required=True, help="where the store is, or is written")
    parser.add_argument("--only", default="", help="only clusters whose description (4 x 1gbit) holds this word")
    parser.add_argument("--wrap", default="", help="words before each command")
    parser.add_argument("--json", type=Path, help="write the outcomes there, too")
    options = parser.parse_args()
    outcomes: list[Outcome] = []
    print("| hosts | rate | link | tokens | allreduce ms | alltoall ms | quicker | margin | auto | |")
    print("|--:|---|---|--:|--:|--:|---|--:|---|---|")
    for (hosts, rate), cases in groupby(CASES, key=lambda case: (case.hosts, case.rate)):
        if options.only in f"{hosts} x {rate or 'bare'}":
            for outcome in measure(list(cases), options.stores, shlex.split(options.wrap)):
                outcomes.append(outcome)
                print(line(outcome), flush=True)
    counted = [outcome for outcome in outcomes if outcome.counts]
    wins = Counter(outcome.winner for outcome in counted)
    right = sum(outcome.right for outcome in counted)
    print(f"\nauto is right in {right} of {len(counted)} cases that count; won by {dict(wins)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")


if __name__ == "__main__":
    main()
