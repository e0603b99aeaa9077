"""What the machine allows, measured by all ranks at once: read bandwidth and arithmetic, on the threads of a run.

Every timed pass begins on all ranks together and lasts until the slowest is done, so that sums over ranks are honest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_moe.engine.measuring.bench_overhead import overhead_seconds
from dist_moe.engine.start.available_memory import available_memory
from dist_moe.kernels import NO_FAULT, KvFormat, WeightFormat, packed_bytes
from dist_moe.model.step import Slice, Step
from dist_moe.model.transformer import Transformer
from dist_moe.parallel.world import World

Figures = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

PASSES = 3
SEARCH_BYTES = 1 << 30  # of all ranks of a host, to choose the best way to read
WAYS = tuple((streams, ahead) for streams in (1, 4, 8, 16) for ahead in (0, 512, 1024, 2048, 4096))
FINALISTS = 2
_PEAK_S = 0.05
_FIRST_ROUNDS = 256
_L1_BYTES = 32 << 10
_TILE_ROWS, _GROUP = 32, 32  # of the matrix in L1
_FILL_TOKENS = 256
_FREE_LEFT_BYTES = 1 << 30  # beside the store, which must stay in the page cache


class Measurement(IntEnum):
    """What a MEASURE order asks for."""

    READ_STORE = 1  # value: MiB per host -> the store's mapped pages: [bytes, then per tried way streams, bytes
    #                 ahead and the seconds of PASSES passes]; bytes are 0 where there is too little to read
    READ_MEMORY = 2  # value: MiB per host -> the same of anonymous memory
    INT8 = 3  # -> [operations/s]
    F32 = 4  # -> [operations/s]
    MATMUL = 5  # -> [operations/s] of our own kernel in L1, in the store's format
    FILL = 6  # value: positions, name: sequence -> [0]; fills its KV cache with random numbers
    OVERHEAD = 7  # value: steps -> [seconds per step beside the kernels], rank 0's


def order_argument(what: Measurement, value: int = 0, name: int = 0) -> int:
    """The argument of a MEASURE order: which measurement, a size (31 bits) and a name (24 bits)."""
    assert 0 <= value < 1 << 31
    assert 0 <= name < 1 << 24
    return int(what) | name << 8 | value << 32


class Measurer:
    """One rank's part of the measurements. A call is collective: all ranks make the same ones."""

    def __init__(self, model: Transformer, kv_format: KvFormat) -> None:
        """Measure with the model's kernels and exchanges; nothing happens before the first call."""
        self._model = model
        self._kv_format = kv_format
        self._exchange = model.exchange
        self._kernels = model.kernels

    def __call__(self, argument: int) -> Figures:
        """Carry out an order; float64 [n]."""
        what, name, value = Measurement(argument & 0xFF), argument >> 8 & 0xFFFFFF, argument >> 32
        if what is Measurement.READ_STORE:
            return self._read(self._store_bytes(value << 20), value << 20)
        if what is Measurement.READ_MEMORY:
            return self._read(self._anonymous_bytes(value << 20), value << 20)
        if what is Measurement.FILL:
            self._fill(name, value)
            return np.zeros(1)
        if what is Measurement.OVERHEAD:
            return np.array([overhead_seconds(self._model, self._kv_format, value)])
        return self._peak(what)

    # ---- reading ----

    def _store_bytes(self, host_bytes: int) -> Bytes:
        """This rank's part of the largest weight file, mapped."""
        store = self._model.weights.store
        path = max(store.present_paths, key=lambda path: path.stat().st_size)
        return _part(_mapped(path), host_bytes, self._exchange.world)

    def _anonymous_bytes(self, host_bytes: int) -> Bytes:
        """This rank's part of fresh memory, as much as the store leaves room for, none if the search needs more."""
        world, store = self._exchange.world, self._model.weights.store
        store_bytes = sum(entry.file_bytes for entry in store.manifest.files)
        room_bytes = max(0, available_memory().available_bytes - store_bytes - _FREE_LEFT_BYTES)
        room = np.array([min(2**31 - 1, room_bytes >> 20)], dtype=np.int32)
        self._exchange.min_faults(room)  # the least over ranks: each takes the same
        size = min(host_bytes, int(room[0]) << 20) // world.local_size
        return np.ones(size if size * world.local_size >= min(SEARCH_BYTES, host_bytes) else 0, np.uint8)

    def _read(self, data: Bytes, host_bytes: int) -> Figures:
        """Choose the best ways on a part of the data, then read all of it several times in each."""
        figures = np.zeros((FINALISTS, 2 + PASSES))
        if len(data):
            sample = data[: max(1, min(SEARCH_BYTES, host_bytes) // self._exchange.world.local_size)]
            self._kernels.read_seconds(data, 4, 0)  # brings it from the disk, and its pages into the tables
            seconds = [self._slowest(self._pass(sample, *way)) for way in WAYS]
            for row, i in zip(figures, sorted(range(len(WAYS)), key=seconds.__getitem__), strict=False):
                row[:] = (*WAYS[i], *(self._pass(data, *WAYS[i]) for _ in range(PASSES)))
        return np.concatenate([[len(data)], figures.ravel()])

    def _pass(self, data: Bytes, streams: int, ahead_bytes: int) -> float:
        """Seconds of this rank; all begin together."""
        self._barrier()
        return self._kernels.read_seconds(data, streams, ahead_bytes)[0]

    # ---- arithmetic ----

    def _peak(self, what: Measurement) -> Figures:
        """The best of a few passes, each so long that starting the threads does not count."""
        kernels, fmt = self._kernels, self._model.share.format
        if what is not Measurement.MATMUL:
            run = kernels.int8_peak if what is Measurement.INT8 else kernels.f32_peak
            return np.array([self._best(run)])
        best = 0.0
        for tokens in (8, 16, 32):
            columns = columns_in_cache(fmt, tokens)
            run = partial(kernels.matmul_peak, _TILE_ROWS, columns, tokens, fmt, _GROUP)
            best = max(best, self._best(run))
        return np.array([best])

    def _best(self, run: Callable[[int], float]) -> float:
        rounds = _FIRST_ROUNDS
        started_s = time.perf_counter()
        run(rounds)
        rounds = max(1, int(rounds * _PEAK_S / (time.perf_counter() - started_s)))
        best = 0.0
        for _ in range(PASSES):
            self._barrier()
            best = max(best, run(rounds))
        return best

    # ---- the KV cache ----

    def _fill(self, sequence: int, positions: int) -> None:
        """Fill a sequence's cache with random K and V through the kernel that always narrows them."""
        model, kernels = self._model, self._kernels
        g, P = len(model.share.plan.kv_heads), model.config.head_dim
        kv_TR = np.random.default_rng(sequence).standard_normal((_FILL_TOKENS, 2 * g * P), dtype=np.float32)
        fault_T = np.full(_FILL_TOKENS, NO_FAULT, np.int32)
        for first in range(0, positions, _FILL_TOKENS):
            count = min(_FILL_TOKENS, positions - first)
            step = Step((Slice(sequence, first, (0,) * count),), (), (), False, 0)
            for layer in range(model.config.layers):
                view = model.cache.view(step, layer)
                kernels.kv_store(view, fault_T, kv_TR, 0, g * P, g, P, layer)

    # ---- together ----

    def _barrier(self) -> None:
        self._exchange.min_faults(np.zeros(1, np.int32))

    def _slowest(self, seconds: float) -> float:
        """The longest over ranks, to the microsecond."""
        microseconds = np.array([-min(int(seconds * 1e6), 2**31 - 1)], np.int32)
        self._exchange.min_faults(microseconds)
        return -int(microseconds[0]) / 1e6


@dataclass(frozen=True)
class ReadSpeed:
    """How fast all hosts together read, and how.

    Attributes:
        rate: Bytes per second, the best pass.
        source: "store" (its mapped pages) or "memory" (anonymous).
        bytes: Read in a pass, over all ranks.
        streams: Runs that a thread read side by side.
        ahead_bytes: How far ahead it prefetched.
    """

    rate: float
    source: str
    bytes: int
    streams: int
    ahead_bytes: int


def read_speed(figures_Wn: Figures, node_of_rank: Sequence[int], source: str) -> ReadSpeed:
    """Combine the ranks' figures of a READ measurement: in each pass a host is as fast as its slowest rank."""
    bytes_W, ways_Wfn = figures_Wn[:, 0], figures_Wn[:, 1:].reshape(len(figures_Wn), FINALISTS, 2 + PASSES)
    best = ReadSpeed(0.0, source, int(bytes_W.sum()), 0, 0)
    nodes = [[rank for rank, where in enumerate(node_of_rank) if where == node] for node in sorted(set(node_of_rank))]
    for way in range(FINALISTS) if best.bytes else ():
        for turn in range(2, 2 + PASSES):
            rate = sum(float(bytes_W[ranks].sum() / ways_Wfn[ranks, way, turn].max()) for ranks in nodes)
            if rate > best.rate:
                streams, ahead = ways_Wfn[0, way, :2].astype(int).tolist()
                best = replace(best, rate=rate, streams=streams, ahead_bytes=ahead)
    return best


def columns_in_cache(fmt: WeightFormat, tokens: int) -> int:
    """Columns of a matrix of 32 rows that stays in L1 together with its operand and its result."""
    operand_bytes = 1 if fmt.quantized else 4
    fits = [
        columns
        for columns in (64, 128, 256, 512, 1024)
        if packed_bytes(fmt, _TILE_ROWS, columns, _GROUP) + tokens * (columns * operand_bytes + _TILE_ROWS * 4)
        <= _L1_BYTES
    ]
    return max(fits, default=32)


def _mapped(path: Path) -> Bytes:
    return np.asarray(np.memmap(path, np.uint8, "r"))


def _part(data: Bytes, host_bytes: int, world: World) -> Bytes:
    """This rank's run of the first `host_bytes` bytes, on whole pages."""
    size = min(len(data), host_bytes) // world.local_size
    first = size * world.local_rank // 4096 * 4096
    return data[first : first + size]
