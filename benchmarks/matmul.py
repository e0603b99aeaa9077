"""How fast one quantized matrix is multiplied with 1 to 64 tokens, on every ISA level of this machine.

    python benchmarks/matmul.py [--quick] [--isa avx2,avx512vnni] [--threads 2] [--group 32] [--json]

A matrix of at least a quarter GiB, too large for a cache, in runs that alternate with a loop that only reads. Columns:
GB/s of packed weights, their share of what the loop reads, and 10^9 operations per second. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np

from dist_moe.kernels import (
    NO_FAULT,
    Kernels,
    MatrixFormat,
    MatrixList,
    Operand,
    WeightFormat,
    aligned_empty,
    isa_levels,
    packed_bytes,
)
from dist_moe.kernels.arrays import U8Array

COLUMNS = 2048
STREAMS = ((1, 0), (1, 1024), (2, 1024))  # (streams, bytes of prefetch ahead) of the reading loop; the best counts


@dataclass(frozen=True)
class Row:
    """One measurement; speeds are medians."""

    isa: str
    threads: int
    format: str
    group: int
    tokens: int
    gigabytes_per_s: float
    read_share: float
    gigaops_per_s: float


def random_weights(fmt: WeightFormat, rows: int, group: int) -> U8Array:
    """Packed bytes of any values: all are finite float16 scales and integers."""
    size = packed_bytes(fmt, rows, COLUMNS, group)
    tile = np.random.default_rng(0).integers(0, 60, 1 << 20, dtype=np.uint8)
    weights = aligned_empty((size,), np.uint8)
    weights[:] = np.resize(tile, size)
    return weights


def read_rate(kernels: Kernels, weights: U8Array) -> float:
    """Bytes per second of the best reading loop."""
    return max(len(weights) / kernels.read_seconds(weights, *how)[0] for how in STREAMS)


def measure(
    kernels: Kernels, fmt: WeightFormat, weights: U8Array, rows: int, tokens: int, args: argparse.Namespace
) -> Row:
    """Alternate products and reading loops."""
    operand = Operand(tokens, COLUMNS, quantized=True)
    operand.x_TC[:] = np.random.default_rng(1).standard_normal((tokens, COLUMNS), dtype=np.float32)
    kernels.quantize(operand, np.full(tokens, NO_FAULT, np.int32), tokens, 0)
    out_TR, matrices = (
        aligned_empty((tokens, rows), np.float32),
        MatrixList([(weights, rows, 0, MatrixFormat(fmt, args.group))]),
    )
    seconds, shares = [], []
    for repetition in range(args.repetitions + 1):
        started_s = time.perf_counter()
        kernels.matmul(out_TR, matrices, operand, tokens)
        elapsed_s = time.perf_counter() - started_s
        if repetition > 0:  # the first one also brings in pages
            seconds.append(elapsed_s)
            shares.append(len(weights) / elapsed_s / read_rate(kernels, weights))
    median_s = statistics.median(seconds)
    return Row(
        isa=kernels.isa,
        threads=args.threads,
        format=fmt.label,
        group=args.group,
        tokens=tokens,
        gigabytes_per_s=len(weights) / median_s / 1e9,
        read_share=statistics.median(shares),
        gigaops_per_s=2 * rows * COLUMNS * tokens / median_s / 1e9,
    )


def arguments() -> argparse.Namespace:
    """The command line; every option has a default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tokens 1, 2, 4, 8, 16, 64; three repetitions")
    parser.add_argument("--isa", default=",".join(isa_levels()), help="levels, separated by commas")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--group", type=int, default=32, help="weights per scale: 32, 64, 128, or 0 for rows")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    args = parser.parse_args()
    args.tokens = (1, 2, 4, 8, 16, 64) if args.quick else (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 128)
    args.repetitions = 3 if args.quick else 9
    return args


def main() -> None:
    """Print one line per level, format and number of tokens."""
    args = arguments()
    for fmt, rows in ((WeightFormat.Q4, 1 << 18), (WeightFormat.Q8, 1 << 17)):
        weights = random_weights(fmt, rows, args.group)
        for isa in args.isa.split(","):
            with Kernels(threads=args.threads, isa=isa) as kernels:
                for tokens in args.tokens:
                    row = measure(kernels, fmt, weights, rows, tokens, args)
                    print(json.dumps(asdict(row)) if args.json else table_line(row), flush=True)


def table_line(row: Row) -> str:
    """A row for people."""
    return (
        f"{row.isa:<10} {row.format} group {row.group:<3} T {row.tokens:<3}  {row.gigabytes_per_s:5.1f} GB/s "
        f"{row.read_share:4.0%} of reading  {row.gigaops_per_s:5.0f} GOPS"
    )


if __name__ == "__main__":
    main()
