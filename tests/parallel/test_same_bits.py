"""The promise: one hash of all logits, whatever ranks, layout, threads, chunks, batch, shards and ISA."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.kernels import WeightFormat
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
                format=WeightFormat.parse(weights), nodes=nodes, experts="sliced" if nodes == 3 else "whole"
            )
            convert(source, directory / f"{weights}-{nodes}", options, lambda done, total, what: None)
    return directory


@pytest.mark.parametrize("ranks", RANKS)
def test_every_combination_gives_the_committed_bits(ranks: int, stores: Path, mpirun) -> None:
    result = mpirun(ranks, sys.executable, ROOT / "helpers" / "same_bits.py", stores, timeout_s=280)
    assert result.code == 0, result.stderr
    hashes = json.loads(result.stdout.splitlines()[-1])
    committed = json.loads(COMMITTED.read_text())
    assert set(hashes) == set(committed)
    for name, combinations in hashes.items():
        wrong = [combination for combination, found in combinations.items() if found != committed[name]]
        assert not wrong, f"{name}, {ranks} ranks: {len(wrong)} of {len(combinations)}, such as {wrong[0]}"
        assert len(combinations) >= 48
