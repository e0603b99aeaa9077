"""Candidates of several ranks against those of the whole row, without MPI.

N rows, V vocabulary, v one rank's columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from dist_moe.engine.requests.candidates import CandidateExchange, Candidates, block_sums, row_candidates
from dist_moe.kernels import NO_FAULT, Kernels
from dist_moe.model.step import MAX_LOGIT_ROWS, Slice, Step

V = 1420  # 12 blocks, the last one of 12
SPLITS = {
    "one": [tuple(range(12))],
    "in order": [(0, 1, 2), (3, 4, 5, 6, 7, 8, 9, 10, 11)],
    "mixed": [(2, 5, 6), (), (0, 1, 11), (3, 4, 7, 8, 9, 10)],
}


@dataclass
class Plan:
    vocabulary_blocks: tuple[int, ...]

    @property
    def columns(self) -> list[int]:
        return [c for b in self.vocabulary_blocks for c in range(128 * b, min(128 * b + 128, V))]

    @property
    def vocabulary_rows(self) -> int:
        return len(self.columns)


@dataclass
class Job:
    plans: list[Plan]


class Post:
    """The gather of one thread that plays all ranks in turn, rank 0 last."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.sent = ranks, []

    def gather_equal(self, local: np.ndarray, out: np.ndarray | None = None) -> np.ndarray | None:
        self.sent.insert(0, local.copy())
        if len(self.sent) < self.ranks:
            return None
        found = np.stack(self.sent, out=out)
        self.sent.clear()
        return found


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(2)


def same(found: Candidates, expected: Candidates) -> None:
    assert found.complete == expected.complete
    for name in ("ids_C", "logits_C", "max_B", "sum_B", "unit_sum_B"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        assert one is None or one.tobytes() == other.tobytes(), name


@pytest.mark.parametrize("split", SPLITS)
def test_candidates_are_those_of_the_whole_row(kernels: Kernels, split: str) -> None:
    job, rng = Job([Plan(blocks) for blocks in SPLITS[split]]), np.random.default_rng(1)
    ranks = len(job.plans)
    post = Post(ranks)
    exchanges = [CandidateExchange(post, kernels, job, rank) for rank in range(ranks)]
    steps = [(1, False, V), (1, False, V), (3, False, V), (3, True, V), (3, True, 1300), (2, False, 256), (2, False, 0)]
    for turn, (N, unit_sums, valid) in enumerate(steps):
        logits_NV = np.rint(rng.standard_normal((N, V)) * 9).astype(np.float32) / 4
        temperatures = [0.0, 1.0, 0.7][:N] if turn % 2 else [0.6, 0.0, 1.0][:N]
        for rank in reversed(range(ranks)):
            fault_N = np.full(N, NO_FAULT, np.int32)
            logits_Nv = np.ascontiguousarray(logits_NV[:, job.plans[rank].columns])
            found = exchanges[rank].gather(logits_Nv, temperatures, valid, fault_N, 2, unit_sums)
            assert (found is None) == (rank > 0)
            assert (fault_N == NO_FAULT).all()
        _, unit_sum_NB = block_sums(kernels, logits_NV, [1.0] * N, valid, fault_N, 2)
        for row, (logits_V, temperature) in enumerate(zip(logits_NV, temperatures, strict=True)):
            expected = row_candidates(kernels, logits_V, temperature, valid, 256)
            same(found[row], replace(expected, unit_sum_B=unit_sum_NB[row] if unit_sums else None))


def test_a_fault_is_noted(kernels: Kernels) -> None:
    plan, logits_NV, fault_N = Plan(tuple(range(12))), np.zeros((2, V), np.float32), np.full(2, NO_FAULT, np.int32)
    logits_NV[1, 700] = np.inf
    CandidateExchange(Post(1), kernels, Job([plan]), 0).gather(logits_NV, [0.0, 1.0], V, fault_N, 2)
    assert fault_N[0] == NO_FAULT
    assert fault_N[1] >> 8 == 2


def test_rows_of_one_step_do_not_overwrite_each_other(make_store, make_engine, tiny_directory: Path) -> None:
    """A step whose rows go in two messages."""
    engine = make_engine(make_store(tiny_directory))
    rows = 2 * MAX_LOGIT_ROWS
    slices = tuple(Slice(row, 0, (row % 7,)) for row in range(rows))
    together = engine.crew.run(Step(slices, tuple(range(rows)), (0.0,) * rows, False, 90))
    assert len(together.candidates) == rows
    for row, found in enumerate(together.candidates):
        alone = engine.crew.run(Step((Slice(100 + row, 0, (row % 7,)),), (0,), (0.0,), False, 90))
        same(found, alone.candidates[0])
