"""The same seed gives the same text: every sampler, on 1 to 4 ranks, alone and in a batch, with reuse and without."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.kernels import WeightFormat
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from helpers import same_texts
from helpers.tiny_model import TinyModel

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "golden" / "same_texts.json"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("store") / "store"
    source = Checkpoint.open(TinyModel().write(tmp_path_factory.mktemp("tiny")))
    convert(source, directory, StoreOptions(format=WeightFormat.Q8, nodes=2), lambda done, total, what: None)
    return directory


def texts_on(ranks: int, store: Path, mpirun: Any) -> dict[str, dict[str, Any]]:
    result = mpirun(ranks, sys.executable, ROOT / "helpers" / "same_texts.py", store, timeout_s=120)
    assert result.code == 0, result.stderr
    found: dict[str, dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_sampler_draws_the_committed_text(ranks: int, store: Path, mpirun) -> None:
    texts, committed = texts_on(ranks, store, mpirun), json.loads(COMMITTED.read_text())
    assert set(texts) == set(committed)
    for name, combinations in texts.items():
        assert len(combinations) == (8 if name in same_texts.SAMPLERS else 4)
        for combination, found in combinations.items():
            assert found == committed[name], f"{name}, {ranks} ranks, {combination}"


def test_the_samplers_differ() -> None:
    """Else the test above would show nothing."""
    committed = json.loads(COMMITTED.read_text())
    drawn = [tuple(found[0]) for name, found in committed.items() if name != "beams"]
    assert len(set(drawn)) == len(drawn) == same_texts.BATCH
    assert max(len(set(ids)) for ids in drawn) > same_texts.TOKENS // 2
    assert all(id_ < same_texts.VALID for ids in drawn for id_ in ids)
    assert len({tuple(ids) for ids, _ in committed["beams"]}) == 5
