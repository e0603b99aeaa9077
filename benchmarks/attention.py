"""What attention costs: decode steps at some depth against memory's speed, and prefill against the fma peak.

    python benchmarks/attention.py [--isa LEVEL] [--threads 2] [--depth 4096] [--prompt 2048] [--heads 32 --kv-heads 4]

Several layers' caches are read in turn, so that decode reads memory, not the last-level cache. Decode prints GB/s of K
and V; prefill prints GFLOP/s (4 h P per pair of positions).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from dist_moe.kernels import NO_FAULT, Kernels, KvFormat, KvView, aligned_empty, kv_block_bytes


@dataclass(frozen=True)
class Row:
    """One measurement: medians, and the spread between the 10th and the 90th percentile as a share of it."""

    test: str
    kv: str
    isa: str
    threads: int
    tokens: int
    depth: int
    batch: int
    milliseconds: float
    spread: float
    gb_per_s: float
    gflop_per_s: float


class Bench:
    """Random caches of some layers and sequences."""

    def __init__(self, options: argparse.Namespace, fmt: KvFormat, positions: int, layers: int, batch: int) -> None:
        self.options, self.fmt, self.layers, self.batch = options, fmt, layers, batch
        self.h, self.g, self.P = options.heads, options.kv_heads, options.head_dim
        self.kernels = Kernels(threads=options.threads, isa=options.isa)
        self.block_count = -(-positions // 64)
        self.layer_bytes = self.g * kv_block_bytes(fmt, self.P)
        self.width = (self.h + 2 * self.g) * self.P
        self.kv_of_h = np.repeat(np.arange(self.g, dtype=np.int32), self.h // self.g)
        self.blocks = [aligned_empty((layers * self.layer_bytes,), np.uint8) for _ in range(self.block_count * batch)]
        self.rng = np.random.default_rng(1)
        self._fill(positions)

    def rows(self, tokens: int) -> np.ndarray:
        """Random q, k and v."""
        return self.rng.standard_normal((tokens, self.width), dtype=np.float32)

    def views(self, sequence_T: np.ndarray, position_T: np.ndarray) -> list[KvView]:
        """The views of some tokens, one per layer."""
        table_T, size = sequence_T * self.block_count, self.layer_bytes
        return [KvView(self.blocks, table_T, position_T, i * size, self.fmt) for i in range(self.layers)]

    def _fill(self, positions: int) -> None:
        """One sequence's first layer is computed; the others are its copies."""
        rows, views = self.rows(positions), self.views(np.zeros(positions, np.int64), np.arange(positions))
        self.store(views[0], rows)
        for i, block in enumerate(self.blocks):
            first = self.blocks[i % self.block_count][: self.layer_bytes]
            block.reshape(self.layers, -1)[...] = first

    def store(self, view: KvView, rows: np.ndarray) -> None:
        """K and V of the view's tokens."""
        k_column = self.h * self.P
        v_column = k_column + self.g * self.P
        fault_T = np.full(len(rows), NO_FAULT, np.int32)
        self.kernels.kv_store(view, fault_T, rows, k_column, v_column, self.g, self.P, 0)

    def calls(self, views: list[KvView], rows: np.ndarray) -> Callable[[], None]:
        """One attention call per layer."""
        out, fault_T = np.empty((len(rows), self.h * self.P), np.float32), np.full(len(rows), NO_FAULT, np.int32)
        scale = np.float32(self.P**-0.5)

        def run() -> None:
            for layer, view in enumerate(views):
                self.kernels.attention(out, fault_T, rows, view, self.kv_of_h, scale, self.g, self.P, layer)

        return run

    def measure(self, run: Callable[[], None]) -> tuple[float, float]:
        """Median milliseconds per layer, and the spread."""
        run()
        sample = []
        stop_s = time.perf_counter() + self.options.seconds
        while len(sample) < 3 or time.perf_counter() < stop_s:
            started_s = time.perf_counter()
            run()
            sample.append((time.perf_counter() - started_s) * 1e3 / self.layers)
        ordered = sorted(sample)
        tail = ordered[int(0.9 * (len(ordered) - 1))] - ordered[int(0.1 * (len(ordered) - 1))]
        return statistics.median(ordered), tail / statistics.median(ordered)

    def row(self, test: str, position_T: np.ndarray, run: Callable[[], None]) -> Row:
        """Time a call; bytes count once per sequence, operations for every pair of positions."""
        milliseconds, spread = self.measure(run)
        kv_bytes = self.batch * self.layer_bytes * (int(position_T.max()) + 1) / 64
        flops = 4 * self.h * self.P * float((position_T + 1).sum())
        return Row(
            test,
            self.fmt.label,
            self.kernels.isa,
            self.options.threads,
            len(position_T),
            int(position_T.min()),
            self.batch,
            round(milliseconds, 4),
            round(spread, 3),
            round(kv_bytes / milliseconds / 1e6, 2),
            round(flops / milliseconds / 1e6, 1),
        )


def decode(options: argparse.Namespace, fmt: KvFormat) -> Row:
    """One token per sequence at the depth asked for."""
    bench = Bench(options, fmt, options.depth, options.layers, options.batch)
    position_T = np.full(options.batch, options.depth - 1, np.int64)
    views, rows = bench.views(np.arange(options.batch, dtype=np.int64), position_T), bench.rows(options.batch)
    return bench.row("decode", position_T, bench.calls(views, rows))


def prefill(options: argparse.Namespace, fmt: KvFormat) -> Row:
    """A whole prompt's causal attention."""
    bench = Bench(options, fmt, options.prompt, 1, 1)
    position_T = np.arange(options.prompt)
    views, rows = bench.views(np.zeros(options.prompt, np.int64), position_T), bench.rows(options.prompt)
    return bench.row("prefill", position_T, bench.calls(views, rows))


def store(options: argparse.Namespace, fmt: KvFormat) -> Row:
    """Narrowing a whole prompt's K and V into the cache."""
    bench = Bench(options, fmt, options.prompt, 1, 1)
    position_T = np.arange(options.prompt)
    views, rows = bench.views(np.zeros(options.prompt, np.int64), position_T), bench.rows(options.prompt)
    return bench.row("store", position_T, lambda: bench.store(views[0], rows))


TESTS = {"decode": decode, "prefill": prefill, "store": store}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", help="an ISA level; the best one by default")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), choices=list(TESTS))
    parser.add_argument("--kv", nargs="+", default=["f16", "q8", "f32"])
    for name, default in (("threads", 2), ("depth", 4096), ("prompt", 2048), ("batch", 1), ("layers", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("heads", 32), ("kv-heads", 4), ("head-dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for label in options.kv:
        for test in options.tests:
            row = TESTS[test](options, KvFormat.parse(label))
            print(json.dumps(asdict(row)) if options.json else "  ".join(f"{k} {v}" for k, v in asdict(row).items()))


if __name__ == "__main__":
    main()
