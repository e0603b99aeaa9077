"""Stores of random weights: valid like any other, the same bytes every time, and numbers that a model can run on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_moe.checkpoint.hf_config import read_hf_config
from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.errors import PlaceError, StoreError, UsageError
from dist_moe.kernels import Kernels, WeightFormat, aligned_empty, packed_bytes
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from dist_moe.store.synthetic import SyntheticModel, synthetic_model, write_synthetic
from dist_moe.store.verify import verify_store
from helpers.tiny_store import ODD, contents, ignore, run_convert

BIG = replace(ODD, model_dim=256, expert_hidden=192)


@pytest.fixture
def model(tmp_path: Path) -> SyntheticModel:
    return synthetic_model(read_hf_config(ODD.write(tmp_path / "odd")), "odd", None)


def write(model: SyntheticModel, directory: Path, fmt: WeightFormat = WeightFormat.Q4, **options: object) -> Path:
    write_synthetic(model, directory, StoreOptions(format=fmt, threads=1, **options), ignore)  # type: ignore[arg-type]
    return directory


@pytest.mark.parametrize("fmt", WeightFormat)
@pytest.mark.parametrize("group_size", [32, 0])
def test_a_store_is_valid(tmp_path: Path, model: SyntheticModel, fmt: WeightFormat, group_size: int) -> None:
    directory = write(model, tmp_path / "store", fmt, group_size=group_size, nodes=2)
    store = Store.open(directory, "full")
    assert store.config == replace(model.config, inv_freq=store.config.inv_freq)
    assert verify_store(directory, store.manifest, store.manifest.files, lambda _: None) == []
    assert store.common("layers.0.attention_norm").tolist() == [1.0] * model.config.model_dim
    assert not store.common("layers.2.q_bias").any()


def test_the_same_model_has_the_same_bytes(tmp_path: Path, model: SyntheticModel) -> None:
    assert contents(write(model, tmp_path / "one")) == contents(write(model, tmp_path / "two"))


def test_units_differ(tmp_path: Path, model: SyntheticModel) -> None:
    store = Store.open(write(model, tmp_path / "store"))
    units = [store.unit("chunk", layer, i).tobytes() for layer in (0, 2) for i in store.present_units("chunk", layer)]
    assert len(set(units)) == len(units)


@pytest.mark.parametrize("fmt", WeightFormat)
@pytest.mark.parametrize("group_size", [32, 0])
def test_a_matrix_keeps_the_size_of_what_it_multiplies(tmp_path: Path, fmt: WeightFormat, group_size: int) -> None:
    config = read_hf_config(BIG.write(tmp_path / "big"))
    store = Store.open(write(SyntheticModel(config, "big"), tmp_path / "store", fmt, group_size=group_size))
    width = store.manifest.layer_chunk_width(0)
    size = packed_bytes(fmt, width, config.model_dim, group_size)
    gate = aligned_empty(size, np.uint8)
    gate[:] = store.unit("chunk", 0, 3)[:size]
    weights_RC = np.empty((width, config.model_dim), np.float32)
    with Kernels(1) as kernels:
        kernels.unpack(weights_RC, gate, fmt, group_size)
    assert np.sqrt((weights_RC**2).sum(axis=1)).mean() == pytest.approx(1, rel=0.1)
    assert abs(weights_RC.mean()) < 0.1 * weights_RC.std()


def test_an_interrupted_store_is_not_a_store_and_is_continued(tmp_path: Path, model: SyntheticModel) -> None:
    def interrupt(done_bytes: int, total_bytes: int, what: str) -> None:
        if what.startswith("shard") and done_bytes > total_bytes // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_synthetic(model, tmp_path / "store", StoreOptions(threads=1), interrupt)
    with pytest.raises(StoreError, match="incomplete store"):
        Store.open(tmp_path / "store")
    done = write_synthetic(model, tmp_path / "store", StoreOptions(threads=1), ignore)
    assert done.kept_files == ("common.safetensors",)
    assert contents(tmp_path / "store") == contents(write(model, tmp_path / "fresh"))


def test_a_whole_store_is_left_alone(tmp_path: Path, model: SyntheticModel) -> None:
    write(model, tmp_path / "store")
    assert write_synthetic(model, tmp_path / "store", StoreOptions(threads=1), ignore).written_files == ()


def test_what_stands_there_is_not_replaced(tmp_path: Path, model: SyntheticModel, checkpoint: Checkpoint) -> None:
    run_convert(checkpoint, tmp_path / "other")
    with pytest.raises(StoreError, match="holds a store made with other options"):
        write(model, tmp_path / "other")
    write(model, tmp_path / "store")
    with pytest.raises(StoreError, match="weights q4, not q8"):
        write(model, tmp_path / "store", WeightFormat.Q8)
    with pytest.raises(PlaceError, match="is not empty and not a store"):
        write(model, tmp_path)


def test_layers_are_cut_off(tmp_path: Path, model: SyntheticModel) -> None:
    cut = synthetic_model(model.config, "odd", 2)
    assert (cut.config.layers, cut.config.dense_layers, cut.name) == (2, (1,), "synthetic-odd-2-layers")
    assert synthetic_model(model.config, "odd", 1).config.dense_layers == ()
    assert cut.fingerprint() != model.fingerprint()
    assert Store.open(write(cut, tmp_path / "store")).config.layers == 2
    with pytest.raises(UsageError, match="--layers 4: odd has 3 layers; give 1 to 3"):
        synthetic_model(model.config, "odd", 4)
