"""`--rope-scaling`: the frequencies of a config.json that says the same, and where it makes no sense."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_moe.checkpoint.hf_config import read_hf_config
from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.checkpoint.rope import RopeSettings, rope_frequencies
from dist_moe.errors import UsageError
from dist_moe.model_config import ModelConfig
from dist_moe.store.reader import Store
from dist_moe.store.rope_scaling import RopeScaling, scale_config
from helpers.tiny_model import TinyModel
from helpers.tiny_store import run_convert


def config_of(directory: Path, **changes: Any) -> ModelConfig:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(TinyModel(head_dim=128).config_json() | changes))
    return read_hf_config(directory)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6, 5e6, 1e7, 1234567.0, 123456.789])
@pytest.mark.parametrize(("factor", "original"), [(4.0, 32768), (2.5, None), (4.0, None)])
def test_the_frequencies_are_those_of_a_config_that_says_yarn(
    theta: float, factor: float, original: int | None, tmp_path: Path
) -> None:
    both = {"rope_theta": theta, "max_position_embeddings": 40960}
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original or 40960}
    expected = config_of(tmp_path, **both, rope_scaling=yarn)
    plain = config_of(tmp_path, **both)
    found = scale_config(plain, RopeScaling(factor, original))
    assert found.inv_freq.tobytes() == expected.inv_freq.tobytes()
    assert found.attention_factor == expected.attention_factor != 1
    assert found.max_positions == int((original or 40960) * factor)
    assert not np.array_equal(found.inv_freq, plain.inv_freq)


def test_none_changes_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert scale_config(config, None) is config


@pytest.mark.parametrize(
    ("text", "found"),
    [("yarn:4", RopeScaling(4.0)), ("yarn:2.5", RopeScaling(2.5)), ("yarn:4:32768", RopeScaling(4.0, 32768))],
)
def test_good_texts(text: str, found: RopeScaling) -> None:
    assert RopeScaling.parse(text) == found


@pytest.mark.parametrize("text", ["", "yarn", "yarn:", "4", "linear:4", "yarn:x", "yarn:4:", "yarn:4:1:2", "yarn:-4"])
def test_bad_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--rope-scaling: expected yarn:FACTOR or .*, found"):
        RopeScaling.parse(text)


@pytest.mark.parametrize("text", ["yarn:1", "yarn:0.5", "yarn:0", "yarn:1000", "yarn:4:0"])
def test_bad_numbers_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--rope-scaling: expected a factor above 1, up to 256.*, found"):
        RopeScaling.parse(text)


@pytest.mark.parametrize(("factor", "original"), [(1.2, 1000), (2.0, 5000), (2.0, 2048)])
def test_a_context_that_does_not_grow_is_refused(factor: float, original: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"original positions times .*, but the model has 4096 without it"):
        scale_config(config_of(tmp_path), RopeScaling(factor, original))


def test_a_model_that_is_scaled_already_is_refused(tmp_path: Path) -> None:
    scaled = scale_config(config_of(tmp_path), RopeScaling(2.0))
    for config in (scaled, replace(scaled, attention_factor=np.float32(1))):
        with pytest.raises(UsageError, match=r"scaled already.*leave the option away"):
            scale_config(config, RopeScaling(2.0))


def test_frequencies_of_one_dimension_have_no_base(tmp_path: Path) -> None:
    config = replace(config_of(tmp_path), head_dim=2, inv_freq=rope_frequencies(RopeSettings(2, 1e6))[0])
    with pytest.raises(UsageError, match="scaled already"):
        scale_config(config, RopeScaling(2.0))


def test_a_store_opens_scaled(tmp_path: Path) -> None:
    run_convert(Checkpoint.open(TinyModel().write(tmp_path / "tiny")), tmp_path / "store")
    plain = Store.open(tmp_path / "store")
    scaled = Store.open(tmp_path / "store", rope_scaling=RopeScaling(2.0))
    assert scaled.config.inv_freq.tobytes() == scale_config(plain.config, RopeScaling(2.0)).inv_freq.tobytes()
    assert scaled.config.max_positions == 2 * plain.config.max_positions
