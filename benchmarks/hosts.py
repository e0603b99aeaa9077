"""Speed over hosts that are network namespaces of this machine (root, iproute2), a core per rank.

    python benchmarks/hosts.py STORE [--cases one,two,gigabit,...] [--prefill 512] [--decode 32] [--json FILE]

`one`: two ranks on one host; `two`: two hosts with a rank each and a cable as fast as it goes; `gigabit`, `bf16`, `q8`:
the same at 1 Gbit/s, with sums exact or rounded (--wire); `allreduce` and `alltoall`: four hosts at 1 Gbit/s, where
cores are shared if the machine has fewer, so that only the two compare. Each host has all of STORE, by hard links
(STORE must be on the file system of the directory for temporary files). Per case: tokens per second of `dist-moe
bench`, the time that the leader's decode and prefill steps spend in exchanges, and what came over the cable.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.cluster import Cluster, obstacle

STEP = re.compile(r"\[rank 0 .*step of (\d+) tokens, .*: ([0-9.]+) ms, of which ([0-9.]+) ms in exchanges")
# Hosts, ranks of each host, rate of the cables, options.
CASES = {
    "one": (1, (2,), None, ()),
    "two": (2, (1, 1), None, ()),
    "gigabit": (2, (1, 1), "1gbit", ()),
    "bf16": (2, (1, 1), "1gbit", ("--wire", "bf16")),
    "q8": (2, (1, 1), "1gbit", ("--wire", "q8")),
    "allreduce": (4, (1, 1, 1, 1), "1gbit", ("--exchange", "allreduce")),
    "alltoall": (4, (1, 1, 1, 1), "1gbit", ("--exchange", "alltoall")),
}
LONGEST_S = 600


@dataclass(frozen=True)
class Measured:
    """A case; speeds in tokens per second, times in ms per step."""

    case: str
    prefill_per_s: float
    decode_per_s: float
    prefill_exchange_ms: float
    decode_exchange_ms: float
    received_bytes: int


def measure(case: str, store: Path, prefill: int, decode: int, repeat: int) -> Measured:
    """Run bench in a case."""
    hosts, ranks, rate, options = CASES[case]
    with Cluster(hosts, rate) as cluster:
        given = cluster.give(store, {host: range(1, 1000) for host in range(hosts)}, link=True)
        command = [sys.executable, "-m", "dist_moe", "bench", "-m", given, "--prefill", prefill, "--decode", decode]
        command += ["--prefill-chunk", prefill, "--depth", 0, "--repeat", repeat, "--threads", 1, "--read-gib", 0.01]
        env = {"UCX_TLS": "all", "OMPI_MCA_btl": "self,sm"} if hosts == 1 else {}
        words = [str(word) for word in (*command, "-o", "json", "-vv", "--stall-timeout", 120, *options)]
        done = cluster.mpirun(ranks, *words, env=env, timeout_s=LONGEST_S)
        received = cluster.received_bytes(hosts - 1)
    if done.code != 0:
        raise SystemExit(done.output)
    rows = {row["test"]: row["tokens_per_s"] for row in json.loads(done.stdout)}
    steps = [(int(tokens), float(waited)) for tokens, _, waited in STEP.findall(done.stderr)]
    by_kind = [[waited for tokens, waited in steps if (tokens == 1) == single] or [0.0] for single in (False, True)]
    exchange = [statistics.median(waits) for waits in by_kind]
    return Measured(case, rows["prefill"], rows["decode"], exchange[0], exchange[1], received)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path, help="add the results to this file")
    options = parser.parse_args()
    if reason := obstacle():
        raise SystemExit(reason)
    known: list[dict[str, object]] = []
    if options.json is not None and options.json.exists():
        known = json.loads(options.json.read_text())
    for case in options.cases.split(","):
        found = measure(case, options.store, options.prefill, options.decode, options.repeat)
        print(
            f"{case:10} prefill {found.prefill_per_s:8.1f}/s  decode {found.decode_per_s:7.2f}/s  in exchanges: "
            f"{found.prefill_exchange_ms:8.2f} ms a prefill step, {found.decode_exchange_ms:6.2f} ms a decode step  "
            f"came over the cable: {found.received_bytes / 1e6:.2f} MB",
            flush=True,
        )
        known.append(asdict(found))
    if options.json is not None:
        options.json.write_text(json.dumps(known, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
