"""How fast and how exact the kernels are: every kernel x format x shape of the 30B and the 235B x tokens x ISA level.

    python benchmarks/matmul.py --quick                       # the 30B, q4 and q8, a few token counts, the best level
    python benchmarks/matmul.py --full -o md                  # everything; many minutes
    python benchmarks/matmul.py --kernels matmul --isa avx2,avx512vnni --formats q4/32 --tokens 1,2,4 --threads 2

Random weights, as many copies as fill --mib, so that no cache keeps them; each timing alternates with a loop that only
reads. Medians. Columns: GB/s of packed weights (or of keys and values), their share of what the reading loop reaches,
GOPS (10^9 additions and multiplications per second), `error` of the outputs against float64 of what the kernel reads,
and `rounding` against float64 of weights and inputs before they were rounded, both as root mean squares over those of
the outputs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from kernel_cases import MODELS, Case, Maker, Model

from dist_moe.errors import DistMoeError
from dist_moe.kernels import Kernels, KvFormat, isa_levels

STREAMS = ((1, 0), (1, 1024), (2, 1024))  # (streams, bytes of prefetch ahead) of the reading loop; the best counts
LONGEST_S = 2.0  # of one line's repetitions, at least one
QUICK_TOKENS, FULL_TOKENS = (1, 8, 64), (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 128)
FORMATS = ("f32", "bf16", *(f"{fmt}/{group}" for fmt in ("q8", "q4") for group in (32, 64, 128, 0)))


@dataclass(frozen=True)
class Row:
    """One measurement."""

    kernel: str
    model: str
    shape: str
    format: str
    isa: str
    threads: int
    tokens: int
    gb_per_s: float
    read_share: float
    gops: float
    error: float
    rounding: float


def measure(kernels: Kernels, model: Model, case: Case, tokens: int, args: argparse.Namespace) -> Row:
    """Alternate passes and reading loops."""
    flat, seconds, shares = case.data.reshape(-1), [], []
    case.run()  # the first one also brings in pages
    stop_s = time.perf_counter() + LONGEST_S
    while len(seconds) < args.repetitions and (not seconds or time.perf_counter() < stop_s):
        started_s = time.perf_counter()
        case.run()
        seconds.append(time.perf_counter() - started_s)
        read_s = min(kernels.read_seconds(flat, *how)[0] for how in STREAMS)
        shares.append(read_s / seconds[-1])
    median_s = statistics.median(seconds)
    found, wanted, exact = case.outputs()
    size = np.linalg.norm(exact)
    return Row(
        kernel=case.kernel,
        model=model.name,
        shape=case.shape,
        format=case.format,
        isa=kernels.isa,
        threads=args.threads,
        tokens=tokens,
        gb_per_s=case.pass_bytes / median_s / 1e9,
        read_share=statistics.median(shares),
        gops=case.operations / median_s / 1e9,
        error=float(np.linalg.norm(found - wanted) / size),
        rounding=float(np.linalg.norm(found - exact) / size),
    )


def cases(maker: Maker, tokens: int, args: argparse.Namespace) -> Iterator[Case]:
    """All that was asked for, one at a time: a case may hold much memory."""
    for label in args.formats:
        for kernel, make in (("matmul", maker.matrices), ("heads", maker.heads), ("experts", maker.experts)):
            if kernel in args.kernels:
                yield from make(label, tokens)
    for label in args.kv if "attention" in args.kernels else ():
        yield maker.attention(label, tokens, args.depth)


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Measure everything."""
    for isa in args.isa:
        with Kernels(threads=args.threads, isa=isa) as kernels:
            for model in (model for model in MODELS if model.name in args.models):
                for tokens in args.tokens:
                    maker = Maker(kernels, model, args.mib << 20)
                    for case in cases(maker, tokens, args):
                        yield measure(kernels, model, case, tokens, args)


def shown(row: Row) -> list[str]:
    """A row's cells for people."""
    numbers = {"gb_per_s": ".1f", "read_share": ".0%", "gops": ".0f", "error": ".1e", "rounding": ".1e"}
    return [format(getattr(row, field.name), numbers.get(field.name, "")) for field in fields(Row)]


def words(text: str) -> list[str]:
    """What commas separate."""
    return text.split(",")


def whole(text: str) -> list[int]:
    """Whole numbers from 1 with commas between them."""
    found = [int(word) for word in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line; every option has a default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="the default: some seconds")
    extent.add_argument("--full", action="store_true", help="both models, all formats, all levels: many minutes")
    parser.add_argument("--kernels", type=words, default=["matmul", "heads", "experts", "attention"])
    parser.add_argument("--models", type=words, help="30b, 235b")
    parser.add_argument("--formats", type=words, help=", ".join(FORMATS))
    parser.add_argument("--kv", type=words, help="f32, f16, q8")
    parser.add_argument("--tokens", type=whole)
    parser.add_argument("--depth", type=int, default=2048, help="positions of attention's sequence")
    parser.add_argument("--isa", type=words, help="levels; the best one, with --full all")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--mib", type=int, help="memory that a pass reads; 64, with --full 512")
    parser.add_argument("-o", dest="format", choices=("text", "md", "json"), default="text")
    args = parser.parse_args(given)
    full: dict[str, Any] = {"models": [model.name for model in MODELS], "formats": [*FORMATS], "isa": isa_levels()}
    full |= {"kv": [fmt.label for fmt in KvFormat], "tokens": FULL_TOKENS, "mib": 512, "repetitions": 9}
    quick: dict[str, Any] = {"models": ["30b"], "formats": ["q4/32", "q8/32"], "isa": isa_levels()[-1:]}
    quick |= {"kv": ["f16"], "tokens": QUICK_TOKENS, "mib": 64, "repetitions": 3}
    for name, value in (full if args.full else quick).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    known = {"kernels": {"matmul", "heads", "experts", "attention"}, "models": {model.name for model in MODELS}}
    known |= {"formats": set(FORMATS), "kv": {fmt.label for fmt in KvFormat}, "isa": set(isa_levels())}
    for name, allowed in known.items():
        for word in getattr(args, name):
            if word not in allowed:
                parser.error(f"--{name}: expected {', '.join(sorted(allowed))}, found {word!r}")
    return args


def main() -> None:
    """Print a line per measurement as it is made."""
    args = arguments()
    names = [field.name for field in fields(Row)]
    if args.format == "md":
        print("| " + " | ".join(names) + " |\n|" + "---|" * 7 + "--:|" * (len(names) - 7))
    try:
        for row in rows(args):
            if args.format == "json":
                print(json.dumps(asdict(row)), flush=True)
            elif args.format == "md":
                print("| " + " | ".join(shown(row)) + " |", flush=True)
            else:
                cells = dict(zip(names, shown(row), strict=True))
                print(
                    f"{cells['kernel']:<15} {row.model:<4} {row.shape:<26} {row.format:<6} {row.isa:<10} "
                    f"x{row.threads} T {row.tokens:<3} {cells['gb_per_s']:>6} GB/s {cells['read_share']:>4} of reading "
                    f"{cells['gops']:>5} GOPS  error {row.error:.1e}  rounding {row.rounding:.1e}",
                    flush=True,
                )
    except DistMoeError as error:
        sys.exit(f"matmul.py: {error}")


if __name__ == "__main__":
    main()
