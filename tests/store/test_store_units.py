"""Units: their bytes, and what is refused; and where each of them stands."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_moe.checkpoint.hf_config import read_hf_config
from dist_moe.errors import UsageError
from dist_moe.kernels import WeightFormat
from dist_moe.model_config import ModelConfig
from dist_moe.split import contiguous
from dist_moe.store.placement import indices_of, place, runs_of, shard_name
from dist_moe.store.plan import StoreOptions, plan_store
from dist_moe.store.synthetic import SyntheticModel
from dist_moe.store.unit_parts import unit_parts
from dist_moe.store.units import UNIT_KINDS, check_format, describe_unit, unit_count
from helpers.tiny_model import TinyModel


def config_of(tmp_path: Path, **changes: object) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(replace(TinyModel(), **changes).config_json()))
    return read_hf_config(tmp_path)


@pytest.mark.parametrize("fmt", list(WeightFormat))
@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
def test_unit_sizes_keep_every_unit_and_its_parts_aligned(tmp_path: Path, fmt: WeightFormat, group_size: int) -> None:
    config = config_of(tmp_path, dense_layers=(), expert_hidden=256)
    manifest = plan_store(SyntheticModel(config, "model"), StoreOptions(format=fmt, group_size=group_size))
    for kind in UNIT_KINDS:
        for part in unit_parts(manifest, kind, 0, 0):
            assert part.bytes.start % 64 == part.bytes.stop % 64 == 0


def test_unit_counts(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert unit_count(config, 32, "head", 0) == 8
    assert unit_count(config, 32, "kv_head", 0) == 2
    assert unit_count(config, 32, "chunk", 0) == 8 * 2  # 192 hidden units are 2 chunks of 96
    assert unit_count(config, 32, "chunk", 1) == 5  # a dense MLP of 160 is 5 chunks of 32
    assert unit_count(config, 32, "vocabulary", 0) == 3
    assert describe_unit(config, 32, "chunk", 0, 5) == "layer 0, expert 2, chunk 1"


def test_group_size_that_fits_no_chunk_is_refused_with_those_that_do(tmp_path: Path) -> None:
    config = config_of(tmp_path)  # 192 and 160 hidden units
    with pytest.raises(UsageError, match="use --group-size 32 or 0"):
        check_format(config, WeightFormat.Q4, 64)
    check_format(config, WeightFormat.Q4, 0)
    check_format(config, WeightFormat.Q8, 32)


def test_head_dim_that_is_no_multiple_of_32_cannot_be_quantized(tmp_path: Path) -> None:
    config = config_of(tmp_path, head_dim=20)
    for fmt in (WeightFormat.Q4, WeightFormat.Q8):
        with pytest.raises(UsageError, match="head_dim 20 is not a multiple of 32"):
            check_format(config, fmt, 32)
    check_format(config, WeightFormat.BF16, 32)


def test_more_terms_than_stay_exact_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, experts=300, experts_per_token=300, expert_hidden=32 * 29)
    with pytest.raises(UsageError, match="adds 8700 units in one sum"):
        check_format(config, WeightFormat.F32, 0)


@given(st.sets(st.integers(0, 60)))
def test_runs_are_a_lossless_short_form_of_indices(indices: set[int]) -> None:
    runs = runs_of(sorted(indices))
    assert indices_of(runs).tolist() == sorted(indices)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(runs))


@pytest.mark.parametrize("layout", ["whole", "sliced"])
@pytest.mark.parametrize("nodes", [1, 3, 4, 8])
def test_shards_hold_every_unit_exactly_once_and_the_kv_heads_that_they_need(
    tmp_path: Path, layout: str, nodes: int
) -> None:
    config = config_of(tmp_path, layers=3)
    shards = [place(config, 32, layout, nodes, shard) for shard in range(nodes)]
    for layer in range(config.layers):
        for kind in ("head", "chunk", "vocabulary"):
            held = np.concatenate([indices_of(shard.runs(kind, layer)) for shard in shards])
            assert sorted(held.tolist()) == list(range(unit_count(config, 32, kind, layer)))
    for shard, units in enumerate(shards):
        heads = contiguous(config.heads, nodes, shard)
        assert indices_of(units.heads).tolist() == list(heads)
        assert indices_of(units.kv_heads).tolist() == sorted({head // 4 for head in heads})


def test_sliced_experts_stand_in_every_shard_and_whole_ones_in_one(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for shard in range(2):
        sliced = indices_of(place(config, 32, "sliced", 2, shard).runs("chunk", 0))
        assert {index // 2 for index in sliced.tolist()} == set(range(8))
        assert {(index // 2 + index % 2) % 2 for index in sliced.tolist()} == {shard}
        whole = indices_of(place(config, 32, "whole", 2, shard).runs("chunk", 0))
        assert whole.tolist() == list(range(8 * shard, 8 * shard + 8))


def test_shard_names_count_from_one() -> None:
    assert shard_name(0, 4) == "shard-00001-of-00004.safetensors"
