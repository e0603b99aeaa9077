"""`hosts_ledger.py STORE EXCHANGE`, on the ranks of two hosts: rank 0 prints what its host's cable carried in both
directions while a prompt was computed, and what the ledger counted meanwhile, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dist_moe import Engine
from helpers.cluster import INTERFACE

PROMPT = [3 + i % 90 for i in range(500)]


def cable_bytes() -> int:
    """Received and sent by this host so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    counts = next(line.split(":")[1].split() for line in lines if line.strip().startswith(f"{INTERFACE}:"))
    return int(counts[0]) + int(counts[8])


def measure(engine: Engine) -> None:
    """On rank 0."""
    before = engine.runtime.accounts().sent_PRK2.sum(axis=(0, 1, 2))
    carried = cable_bytes()
    engine.complete(PROMPT, max_tokens=1)
    carried = cable_bytes() - carried
    by_mpi, _ = engine.runtime.accounts().sent_PRK2.sum(axis=(0, 1, 2)) - before
    print(json.dumps({"carried": carried, "noted": int(by_mpi)}))


if __name__ == "__main__":
    with Engine(sys.argv[1], threads=1, exchange=sys.argv[2]) as engine:
        engine.complete([3, 4], max_tokens=1)  # what is only done once
        engine.lead(measure)
