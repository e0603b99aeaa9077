"""The promise: one hash of all logits, whatever ranks, layout, threads, chunks, batch, shards and ISA."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.kernels import ScaleChoice, WeightFormat, isa_levels
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from helpers import same_bits
from helpers.tiny_model import TinyModel

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "golden" / "same_bits.json"
RANKS = (1, 2, 3, 4, 5, 8)
FORMATS = ("f32", "bf16", "q8", "q4")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store per format and number of nodes, shards cut whole and sliced."""
    source = Checkpoint.open(TinyModel().write(tmp_path_factory.mktemp("tiny")))
    directory = tmp_path_factory.mktemp("stores")
    for weights in FORMATS:
        for nodes in same_bits.NODES if weights == "q4" else (1,):
            options = StoreOptions(
                format=WeightFormat.parse(weights),
                nodes=nodes,
                experts="sliced" if nodes == 3 else "whole",
                scales=ScaleChoice.ABSMAX,
            )
            convert(source, directory / f"{weights}-{nodes}", options, lambda done, total, what: None)
    return directory


@pytest.mark.parametrize("ranks", RANKS)
def test_every_combination_gives_the_committed_bits(ranks: int, stores: Path, mpirun) -> None:
    result = mpirun(ranks, sys.executable, ROOT / "helpers" / "same_bits.py", stores, timeout_s=280)
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    levels, hashes = isa_levels(), found["hashes"]
    assert found["mixed levels"] == [levels[rank % len(levels)] for rank in range(ranks)]
    committed = json.loads(COMMITTED.read_text())
    assert set(hashes) == set(committed)
    for name, combinations in hashes.items():
        wrong = [combination for combination, found in combinations.items() if found != committed[name]]
        assert not wrong, f"{name}, {ranks} ranks: {len(wrong)} of {len(combinations)}, such as {wrong[0]}"
        assert len(combinations) >= 48


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_steps_that_are_partitioned_by_tokens_give_the_committed_bits(ranks: int, stores: Path, mpirun) -> None:
    result = mpirun(ranks, sys.executable, ROOT / "helpers" / "partitioned_bits.py", stores, timeout_s=240)
    assert result.code == 0, result.stderr
    hashes = json.loads(result.stdout.splitlines()[-1])["hashes"]
    committed = json.loads(COMMITTED.read_text())
    assert set(hashes) == set(committed)
    for name, combinations in hashes.items():
        wrong = [combination for combination, found in combinations.items() if found != committed[name]]
        assert not wrong, f"{name}, {ranks} ranks: {len(wrong)} of {len(combinations)}, such as {wrong[0]}"
        assert len(combinations) >= 8


def test_a_job_whose_ranks_were_told_different_levels(mpirun, tmp_path: Path) -> None:
    """One command, and each rank's own DIST_MOE_ISA: every level of this machine, the best one leading."""
    ids = ",".join(map(str, range(1, 71)))  # enough tokens for the kernels that take many at once
    env, levels = {"DIST_MOE_CACHE": str(tmp_path / "cache")}, isa_levels()[::-1][:4]

    def logits(name: str, levels: list[str]) -> npt.NDArray[np.float32]:
        output = tmp_path / f"{name}.npy"
        command = (sys.executable, "-m", "dist_moe", "logits", "--ids", ids, "-o", str(output), "-v", "--threads", "1")
        parts = [("env", f"DIST_MOE_ISA={level}", *command) for level in levels]
        together = list(itertools.chain(*[(":", "-n", "1", *part) for part in parts]))[3:]
        done = mpirun(1, *together, env=env)
        assert done.code == 0, done.output
        for rank, level in enumerate(levels):
            assert re.search(rf"INFO {rank} +\S+ +{level} ", done.stderr), done.output
        return np.load(output)

    expected = logits("alone", ["portable"])
    assert np.array_equal(logits("together", levels).view(np.int32), expected.view(np.int32))
