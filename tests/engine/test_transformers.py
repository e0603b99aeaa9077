"""The engine against transformers in fp32: logits within 1e-4 of the largest, 64 greedy tokens equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dist_moe.demo import demo_model_directory
from dist_moe.engine.requests.request import Request
from dist_moe.kernels import KvFormat

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MODELS = sorted(path.parent for path in (GOLDEN / "models").glob("*/golden.npz"))
TOLERANCE = 1e-4  # of the largest |logit|


def golden_of(source: Path) -> Path:
    return GOLDEN / "demo.npz" if source == demo_model_directory() else source / "golden.npz"


sources = pytest.mark.parametrize("source", [*MODELS, demo_model_directory()], ids=lambda path: path.name)


def test_there_are_golden_models() -> None:
    assert len(MODELS) >= 8


@sources
def test_logits_equal_transformers(source: Path, make_store, make_engine) -> None:
    golden = np.load(golden_of(source))
    engine = make_engine(make_store(source), kv=KvFormat.F32)
    rows: list[np.ndarray] = []
    engine.logits(golden["ids"].tolist(), lambda rows_NV: rows.extend(rows_NV.copy()))
    worst = np.abs(np.stack(rows) - golden["logits"]).max() / np.abs(golden["logits"]).max()
    assert worst <= TOLERANCE


@sources
def test_greedy_tokens_equal_transformers(source: Path, make_store, make_engine) -> None:
    golden = np.load(golden_of(source))
    assert golden["min_margin"] > TOLERANCE, "a near tie proves nothing"
    engine = make_engine(make_store(source), kv=KvFormat.F32)
    expected = golden["greedy_ids"].tolist()
    [completion] = engine.generate([Request(tuple(golden["prompt_ids"].tolist()), len(expected))])
    assert completion.ids == expected
    assert completion.finish_reason == "length"
