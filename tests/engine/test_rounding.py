"""A model with one group of matrices rounded equals the model of rounded weights, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dist_moe.engine.calibrating import calibrate, measure_sensitivity
from dist_moe.engine.perplexity import divergences
from dist_moe.engine.runtime import Runtime
from dist_moe.kernels import KvFormat
from dist_moe.store.calibration import GROUPS_OF_LAYER, REFERENCE, group_count
from dist_moe.store.rounded import round_weights
from helpers.tiny_model import TinyModel, random_ids

TINY = TinyModel(layers=2, experts=4)
IDS = [random_ids(count, TINY.vocabulary, seed=count) for count in (9, 30)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.write(tmp_path_factory.mktemp("whole"))


def logits_of(engine: Runtime) -> np.ndarray:
    rows: list[np.ndarray] = []
    for ids in IDS:
        engine.logits(ids, lambda rows_NV: rows.append(rows_NV.copy()))
    return np.concatenate(rows)


def is_of_group(name: str, group: int) -> bool:
    layer, kind = divmod(group, len(GROUPS_OF_LAYER))
    if layer == TINY.layers:
        return name == "lm_head.weight"
    keys = tuple(f".{key}_proj.weight" for key in GROUPS_OF_LAYER[kind])
    return name.startswith(f"model.layers.{layer}.") and name.endswith(keys)


@pytest.mark.parametrize("group", range(group_count(TINY.layers)))
def test_a_rounded_group(make_store, make_engine, directory: Path, tmp_path: Path, group: int) -> None:
    engine = make_engine(make_store(directory), kv=KvFormat.F32)
    whole = logits_of(engine)
    engine.crew.round_weights(group)
    rounded = logits_of(engine)
    tensors = load_file(TINY.write(tmp_path) / "model.safetensors")
    changed = [name for name in tensors if is_of_group(name, group)]
    assert changed
    for name in changed:
        tensors[name] = round_weights(engine.kernels, tensors[name], REFERENCE, None)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = logits_of(make_engine(make_store(tmp_path), kv=KvFormat.F32))
    assert np.array_equal(rounded, expected)
    assert not np.array_equal(rounded, whole)
    engine.crew.round_weights(-1)
    assert np.array_equal(logits_of(engine), whole)


def test_sensitivities_are_the_divergences_of_rounded_groups(make_store, make_engine, directory: Path) -> None:
    engine = make_engine(make_store(directory), kv=KvFormat.F32)
    told: list[tuple[int, int]] = []
    calibration = calibrate(engine, IDS, lambda: False)
    assert calibration.sensitive_tokens == 0
    found = measure_sensitivity(engine, calibration, IDS, lambda: False, lambda *done: told.append(done))
    groups = group_count(TINY.layers)
    assert found.sensitive_tokens == sum(map(len, IDS))
    assert told == [(done, groups) for done in range(1, groups + 1)]
    whole = logits_of(engine)
    for group in (1, groups - 1):
        engine.crew.round_weights(group)
        assert found.sensitive_G[group] == pytest.approx(divergences(logits_of(engine), whole).sum(), rel=1e-9)
