"""Awkward attention steps, from a generator that never changes, so that the bits of their results can be kept.

T tokens, S positions, h query heads, g KV heads, P head dim. Run as a program this prints attention_bits.json; only a
new version of the numerics contract may change it: PYTHONPATH=. python tests/helpers/attention_cases.py > FILE
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from dist_moe.kernels import NO_FAULT, Kernels, KvFormat, KvView, aligned_empty, kv_block_bytes

LAYER = 3
UNWRITTEN = 0xFF  # NaN in every format


@dataclass(frozen=True)
class AttentionCase:
    """One step: sequences of some lengths, and the (sequence, position) pairs that it asks for."""

    name: str
    P: int
    kv_of_h: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: tuple[tuple[int, int], ...]

    @property
    def h(self) -> int:
        """Query heads."""
        return len(self.kv_of_h)

    @property
    def g(self) -> int:
        """KV heads."""
        return max(self.kv_of_h) + 1


def grouped(ratio: int, kv_heads: int) -> tuple[int, ...]:
    """The KV head of each query head where every KV head serves `ratio` of them."""
    return tuple(head // ratio for head in range(ratio * kv_heads))


def run_of(sequence: int, first: int, last: int) -> tuple[tuple[int, int], ...]:
    """The tokens of a prompt's chunk, positions [first, last)."""
    return tuple((sequence, position) for position in range(first, last))


BORDERS = (0, 1, 62, 63, 64, 65, 127, 128, 129)
MIXED = (130, 1, 70, 64, 200, 65)
MIXED_STEP = (*run_of(4, 120, 137), (0, 129), (1, 0), (2, 69), *run_of(3, 0, 5), (5, 64), (3, 63), (4, 3), (4, 4))

CASES = [
    *(AttentionCase(f"ratio {r}", 64, grouped(r, 2), (130,), tuple((0, p) for p in BORDERS)) for r in (1, 2, 7, 8, 16)),
    *(AttentionCase(f"prompt {r}", 32, grouped(r, 2), (150,), run_of(0, 0, 150)) for r in (1, 2, 7, 8, 16)),
    *(AttentionCase(f"head dim {P}", P, grouped(3, 2), (140,), run_of(0, 50, 140)) for P in (2, 30, 48, 80, 130, 256)),
    AttentionCase("part of the groups", 128, (0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2), (100,), run_of(0, 40, 100)),
    AttentionCase("groups in another order", 32, (2, 2, 0, 0, 0, 1, 0), (100,), run_of(0, 60, 100)),
    AttentionCase("batch", 64, grouped(8, 2), MIXED, MIXED_STEP),
    AttentionCase("batch of single heads", 64, grouped(1, 3), MIXED, MIXED_STEP),
    AttentionCase("long", 128, grouped(8, 1), (4097, 70), ((0, 4096), (1, 69), (0, 4095), (0, 4096))),
    AttentionCase("long prompt's end", 64, grouped(7, 1), (4097,), run_of(0, 4070, 4097)),
    AttentionCase("several waves", 256, grouped(8, 1), (4096,), run_of(0, 4088, 4096)),
]


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Float32 in [-2, 2) with a triangular density, multiples of 2^-23 (SplitMix64, Steele et al. 2014)."""
    count = int(np.prod(shape, dtype=np.int64))
    z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    halves = ((z >> np.uint64(40)).astype(np.int64) + (z & np.uint64(0xFFFFFF)).astype(np.int64) - (1 << 24)) * 2.0**-23
    return np.ascontiguousarray(halves.astype(np.float32).reshape(shape))


class CaseRun:
    """A case's inputs, and the cache that a level of kernels wrote."""

    def __init__(self, case: AttentionCase, fmt: KvFormat, kernels: Kernels, empty=aligned_empty) -> None:
        self.case, self.fmt, self.kernels, self.empty = case, fmt, kernels, empty
        self.h, self.g, self.P = case.h, case.g, case.P
        self.width = (self.h + 2 * self.g) * self.P
        self.rows = [numbers(s + 1, length, self.width) for s, length in enumerate(case.lengths)]
        for rows in self.rows:
            rows[:, : self.h * self.P] *= 3  # weights from 1 down to nothing
        self.first_block = np.cumsum([0, *(-(-length // 64) for length in case.lengths)])
        self.layer_bytes = self.g * kv_block_bytes(fmt, self.P)
        self.blocks = [empty((2 * self.layer_bytes,), np.uint8) for _ in range(int(self.first_block[-1]))]
        for block in self.blocks:
            block.fill(UNWRITTEN)
        for s, length in enumerate(case.lengths):
            self._store(run_of(s, 0, length))

    def step(self, tokens: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, KvView]:
        """Rows [T, (h + 2 g) P] and the view of some tokens."""
        rows_TR = np.ascontiguousarray(np.stack([self.rows[s][p] for s, p in tokens]))
        table_T = np.array([self.first_block[s] for s, _ in tokens], np.int64)
        position_T = np.array([p for _, p in tokens], np.int64)
        return rows_TR, KvView(self.blocks, table_T, position_T, self.layer_bytes, self.fmt)

    def _store(self, tokens: tuple[tuple[int, int], ...]) -> None:
        rows_TR, view = self.step(tokens)
        fault_T = np.full(len(tokens), NO_FAULT, np.int32)
        k_column = self.h * self.P
        self.kernels.kv_store(view, fault_T, rows_TR, k_column, k_column + self.g * self.P, self.g, self.P, LAYER)
        assert (fault_T == NO_FAULT).all()

    def attend(self, tokens: tuple[tuple[int, int], ...] | None = None, kernels: Kernels | None = None) -> np.ndarray:
        """Attention's output float32 [T, h * P] of some tokens, by default the case's."""
        tokens, kernels = tokens or self.case.tokens, kernels or self.kernels
        rows_TR, view = self.step(tokens)
        out_TC, fault_T = (
            self.empty((len(tokens), self.h * self.P), np.float32),
            np.full(len(tokens), NO_FAULT, np.int32),
        )
        kv_of_h, scale = np.array(self.case.kv_of_h, np.int32), np.float32(self.P**-0.5)
        kernels.attention(out_TC, fault_T, rows_TR, view, kv_of_h, scale, self.g, self.P, LAYER)
        assert (fault_T == NO_FAULT).all()
        return out_TC

    def digest(self) -> str:
        """A hash of the cache and of attention's output."""
        hashed = hashlib.blake2b(digest_size=8)
        for block in self.blocks:
            hashed.update(block.tobytes())
        hashed.update(self.attend().tobytes())
        return hashed.hexdigest()


def digests(kernels: Kernels) -> dict[str, str]:
    """The hash of every case in every format of the cache."""
    return {f"{fmt.label}, {case.name}": CaseRun(case, fmt, kernels).digest() for case in CASES for fmt in KvFormat}


if __name__ == "__main__":
    with Kernels(threads=1, isa="portable") as portable_kernels:
        print(json.dumps(digests(portable_kernels), indent=2))
