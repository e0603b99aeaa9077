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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from dist_moe.errors import DistMoeError
from dist_moe.kernels import (
    NO_FAULT,
    ChunkFormat,
    ChunkFormats,
    ChunkList,
    Kernels,
    KvFormat,
    KvView,
    MatrixFormat,
    MatrixList,
    Operand,
    WeightFormat,
    address_of,
    aligned_empty,
    isa_levels,
    kv_block_bytes,
    packed_bytes,
    reference,
)
from dist_moe.model_config import chunk_width

STREAMS = ((1, 0), (1, 1024), (2, 1024))  # (streams, bytes of prefetch ahead) of the reading loop; the best counts
SAMPLE_ROWS = 256  # of a matrix whose error is measured; the rest is copies of them
LONGEST_S = 2.0  # of one line's repetitions, at least one
QUICK_TOKENS, FULL_TOKENS = (1, 8, 64), (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 128)
FORMATS = ("f32", "bf16", *(f"{fmt}/{group}" for fmt in ("q8", "q4") for group in (32, 64, 128, 0)))


@dataclass(frozen=True)
class Model:
    """The sizes that shapes come from."""

    name: str
    model_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    expert_hidden: int
    vocabulary: int


MODELS = (
    Model("30b", 2048, 32, 4, 128, 128, 768, 151936),
    Model("235b", 4096, 64, 4, 128, 128, 1536, 151936),
)


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


@dataclass(frozen=True)
class Case:
    """A kernel on data that is ready.

    Attributes:
        run: One timed pass over all copies.
        data: What it reads, for the reading loop.
        pass_bytes: Of that, what one pass reads.
        operations: Of one pass.
        outputs: After a pass: found, float64 of what was read, float64 before rounding.
    """

    kernel: str
    shape: str
    format: str
    run: Callable[[], None]
    data: np.ndarray
    pass_bytes: int
    operations: float
    outputs: Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray]]


class Maker:
    """Makes the cases of one model at one ISA level."""

    def __init__(self, kernels: Kernels, model: Model, fill_bytes: int) -> None:
        """Random numbers are the same for every level."""
        self.kernels, self.model, self.fill_bytes = kernels, model, fill_bytes
        self.rng = np.random.default_rng(7)

    def matrices(self, label: str, tokens: int) -> Iterator[Case]:
        """q, k and v together, the router (f32), and lm_head."""
        model, fmt = self.model, parse_format(label)
        dim = model.model_dim
        yield self._matmul("matmul qkv", (model.heads + 2 * model.kv_heads) * model.head_dim, dim, fmt, tokens)
        yield self._matmul("matmul lm_head", model.vocabulary, dim, fmt, tokens)
        if fmt.format == WeightFormat.F32:
            yield self._matmul("matmul router", model.experts, dim, fmt, tokens)

    def _matmul(self, name: str, rows: int, columns: int, fmt: MatrixFormat, tokens: int) -> Case:
        packed, weights_RC = self._random_matrix(rows, columns, fmt)
        data = self._copies(packed)
        operand, x_TC = self._operand(tokens, columns, fmt)
        out_TR = aligned_empty((tokens, rows), np.float32)
        lists = [MatrixList([(part, rows, 0, fmt)]) for part in data]

        def run() -> None:
            for matrices in lists:
                self.kernels.matmul(out_TR, matrices, operand, tokens)

        def outputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            sample = len(weights_RC)
            read_RC = unpacked(packed[: packed_bytes(fmt.format, sample, columns, fmt.group)], weights_RC.shape, fmt)
            return out_TR[:, :sample], values(operand) @ read_RC.T, x_TC.astype(np.float64) @ weights_RC.T

        operations = 2.0 * rows * columns * tokens * len(data)
        return Case(name, f"{rows}x{columns}", label_of(fmt), run, data, data.nbytes, operations, outputs)

    def heads(self, label: str, tokens: int) -> Iterator[Case]:
        """o_proj: exact sums over heads."""
        model, fmt = self.model, parse_format(label)
        dim, width = model.model_dim, model.head_dim
        parts = [self._random_matrix(dim, width, fmt) for _ in range(model.heads)]
        data = self._copies(np.concatenate([packed for packed, _ in parts]))
        operand, x_TC = self._operand(tokens, model.heads * width, fmt)
        sums_TD, fault_T = aligned_empty((tokens, dim), np.int64), np.full(tokens, NO_FAULT, np.int32)
        lists = [MatrixList([(unit, dim, 0, fmt) for unit in part.reshape(model.heads, -1)]) for part in data]

        def run() -> None:
            for units in lists:
                self.kernels.unit_sums(sums_TD, fault_T, units, operand, tokens, width, 0)

        def outputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            sample = len(parts[0][1])
            size = packed_bytes(fmt.format, sample, width, fmt.group)
            read_RC = np.concatenate([unpacked(packed[:size], (sample, width), fmt) for packed, _ in parts], axis=1)
            exact_RC = np.concatenate([weights_RC for _, weights_RC in parts], axis=1)
            found = sums_TD[:, :sample] * 2.0**-32
            return found, values(operand) @ read_RC.T, x_TC.astype(np.float64) @ exact_RC.T

        operations = 2.0 * dim * model.heads * width * tokens * len(data)
        shape = f"{model.heads} x {dim}x{width}"
        yield Case("sums over heads", shape, label_of(fmt), run, data, data.nbytes, operations, outputs)

    def experts(self, label: str, tokens: int) -> Iterator[Case]:
        """Expert chunks that all serve every token."""
        model, fmt = self.model, parse_format(label)
        dim, width = model.model_dim, chunk_width(model.expert_hidden, fmt.group)
        shapes = ((width, dim), (width, dim), (dim, width))
        exact = [self._floats(*shape) * np.float32(shape[1] ** -0.5) for shape in shapes]
        packed = [self._pack(weights, fmt) for weights in exact]
        data = self._copies(np.concatenate(packed))
        operand, x_TC = self._operand(tokens, dim, fmt)
        chunks, count = ChunkList(len(data)), np.full(len(data), tokens)
        addresses = np.array([address_of(chunk) for chunk in data], np.uint64)
        chunks.set(addresses, ChunkFormats([ChunkFormat(fmt, fmt)]), np.zeros(len(data), np.int64), count)
        token_N, weight_N = np.arange(tokens, dtype=np.int32), np.ones(tokens, np.float32)
        sums_TD, fault_T = aligned_empty((tokens, dim), np.int64), np.full(tokens, NO_FAULT, np.int32)

        def run() -> None:
            self.kernels.experts(
                sums_TD, fault_T, chunks, len(data), token_N, weight_N, operand, tokens, width, 0
            )  # fmt: skip

        def outputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            read = [unpacked(part, shape, fmt) for part, shape in zip(packed, shapes, strict=True)]
            int8 = fmt.format.quantized
            wanted = reference.expert_chunk(values(operand), *read, weight_N.astype(np.float64), int8)
            plain = [weights.astype(np.float64) for weights in exact]
            unrounded = reference.expert_chunk(x_TC.astype(np.float64), *plain, weight_N.astype(np.float64), False)
            return sums_TD * 2.0**-32 / len(data), wanted, unrounded

        operations = 6.0 * dim * width * tokens * len(data)
        yield Case("expert chunks", f"{width} of {dim}", label_of(fmt), run, data, data.nbytes, operations, outputs)

    def attention(self, label: str, tokens: int, depth: int) -> Case:
        """The last tokens of a sequence over its cache; a copy of the cache for each layer."""
        model, fmt = self.model, KvFormat.parse(label)
        heads, kv_heads, width = model.heads, model.kv_heads, model.head_dim
        depth = max(depth, tokens)
        layer_bytes, block_count = kv_heads * kv_block_bytes(fmt, width), -(-depth // 64)
        rows_SR = self._floats(depth, (heads + 2 * kv_heads) * width)
        first = aligned_empty((block_count, layer_bytes), np.uint8)
        fault_S = np.full(depth, NO_FAULT, np.int32)
        view = KvView(list(first), np.zeros(depth, np.int64), np.arange(depth), 0, fmt)
        self.kernels.kv_store(view, fault_S, rows_SR, heads * width, (heads + kv_heads) * width, kv_heads, width, 0)
        data = self._copies(first.ravel())
        position_T = np.arange(depth - tokens, depth)
        views = [
            KvView(list(part.reshape(block_count, -1)), np.zeros(tokens, np.int64), position_T, 0, fmt) for part in data
        ]
        q_TR = np.ascontiguousarray(rows_SR[depth - tokens :])
        out_TC, fault_T = np.empty((tokens, heads * width), np.float32), np.full(tokens, NO_FAULT, np.int32)
        kv_of_h, scale = np.arange(heads, dtype=np.int32) // (heads // kv_heads), np.float32(width**-0.5)

        def run() -> None:
            for each in views:
                self.kernels.attention(out_TC, fault_T, q_TR, each, kv_of_h, scale, kv_heads, width, 0)

        def outputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            q, k, v = split_rows(rows_SR, model)
            query = KvFormat.Q8 if fmt == KvFormat.Q8 else KvFormat.F32
            rounded = (reference.narrow(q[-1:], query), reference.narrow(k, fmt), reference.narrow(v, fmt))
            exact = (q[-1:].astype(np.float64), k.astype(np.float64), v.astype(np.float64))
            wanted, unrounded = (
                reference.attention(last[0], keys, their_values, kv_of_h, float(scale)).ravel()
                for last, keys, their_values in (rounded, exact)
            )
            return out_TC[-1], wanted, unrounded

        operations = 4.0 * heads * width * float((position_T + 1).sum()) * len(data)
        shape = f"{heads}/{kv_heads} heads, {depth} positions"
        return Case("attention", shape, label, run, data, data.nbytes, operations, outputs)

    def _floats(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape, dtype=np.float32)

    def _pack(self, weights_RC: np.ndarray, fmt: MatrixFormat) -> np.ndarray:
        packed = aligned_empty(packed_bytes(fmt.format, *weights_RC.shape, fmt.group), np.uint8)
        assert self.kernels.pack(packed, weights_RC, None, fmt.format, fmt.group) == 0
        return packed

    def _random_matrix(self, rows: int, columns: int, fmt: MatrixFormat) -> tuple[np.ndarray, np.ndarray]:
        """A packed matrix, and the values of its first rows; the rest repeats them (tiles of 16 rows stand alone)."""
        weights_RC = self._floats(min(rows, SAMPLE_ROWS), columns)
        sample = self._pack(weights_RC, fmt)
        return np.resize(sample, packed_bytes(fmt.format, rows, columns, fmt.group)), weights_RC

    def _copies(self, packed: np.ndarray) -> np.ndarray:
        """As many copies as fill the memory that is to be read, uint8 [n, bytes], on 64-byte boundaries."""
        copies = aligned_empty((max(1, self.fill_bytes // len(packed)), len(packed)), np.uint8)
        copies[:] = packed
        return copies

    def _operand(self, tokens: int, columns: int, fmt: MatrixFormat) -> tuple[Operand, np.ndarray]:
        operand = Operand(tokens, columns, quantized=fmt.format.quantized)
        operand.x_TC[:] = x_TC = self._floats(tokens, columns)
        self.kernels.quantize(operand, np.full(tokens, NO_FAULT, np.int32), tokens, 0)
        return operand, x_TC


def split_rows(rows_SR: np.ndarray, model: Model) -> list[np.ndarray]:
    """Q, K and V [S, heads, P]."""
    ends = [model.heads * model.head_dim, (model.heads + model.kv_heads) * model.head_dim]
    parts = np.split(rows_SR, ends, axis=1)
    return [np.ascontiguousarray(part).reshape(len(rows_SR), -1, model.head_dim) for part in parts]


def parse_format(label: str) -> MatrixFormat:
    """`q4/32` is q4 in groups of 32, `q4/0` in whole rows."""
    name, _, group = label.partition("/")
    return MatrixFormat(WeightFormat.parse(name), int(group or 0))


def label_of(fmt: MatrixFormat) -> str:
    """The inverse."""
    return f"{fmt.format.label}/{fmt.group}" if fmt.format.quantized else fmt.format.label


def unpacked(packed: np.ndarray, shape: tuple[int, int], fmt: MatrixFormat) -> np.ndarray:
    """What the kernels read, from the definition of the bytes."""
    return reference.unpack_matrix(packed, *shape, fmt.format, fmt.group)


def values(operand: Operand) -> np.ndarray:
    """What weights are multiplied with."""
    if operand.quantized:
        return reference.dequantize(operand.q_TC, operand.scale_TG, operand.columns)
    return operand.x_TC.astype(np.float64)


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
