"""Stores that obey a placement: units in several shards, the same bytes, and one sentence for what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.cli.inspect import inspect
from dist_moe.cli.shard import shard
from dist_moe.errors import StoreError, UsageError
from dist_moe.kernels import ScaleChoice
from dist_moe.store.manifest import read_manifest
from dist_moe.store.placement import LayerRuns, Placement, check_placement
from dist_moe.store.placement_json import read_placement, render_placement
from dist_moe.store.reader import Store
from dist_moe.store.units import UNIT_KINDS, unit_count
from helpers.tiny_store import placement_of

MakeStore = Callable[..., Path]


@pytest.fixture
def placement(checkpoint: Checkpoint) -> Placement:
    return placement_of(checkpoint)


def test_the_file_says_what_was_written(placement: Placement, tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    path.write_text(render_placement(placement))
    assert read_placement(path) == placement


def test_a_placed_store_has_the_units_of_any_other(make_store: MakeStore, placement: Placement) -> None:
    plain, placed = Store.open(make_store("plain")), Store.open(make_store("placed", placement=placement))
    assert (placed.manifest.nodes, placed.manifest.experts, placed.manifest.node_weights) == (3, "placed", (3, 2, 1))
    assert placed.manifest.placement == replace(placement, model=placed.manifest.source_name)
    for layer in range(plain.config.layers):
        for kind in UNIT_KINDS:
            for index in range(unit_count(plain.config, 32, kind, layer)):
                assert np.array_equal(placed.unit(kind, layer, index), plain.unit(kind, layer, index))


def test_a_chunk_is_read_from_whichever_file_is_here(make_store: MakeStore, placement: Placement) -> None:
    directory = make_store("placed", placement=placement)
    whole = Store.open(directory)
    expected = [whole.unit("chunk", 0, chunk).copy() for chunk in range(2)]
    for absent in range(3):
        copy = directory.with_name(f"without {absent}")
        shutil.copytree(directory, copy)
        (copy / f"shard-{absent + 1:05}-of-00003.safetensors").unlink()
        store = Store.open(copy)
        for chunk in range(2):  # chunk 0 is in all three, chunk 1 in two
            assert np.array_equal(store.unit("chunk", 0, chunk), expected[chunk])
            assert store.unit_addresses("chunk", 0)[chunk]
        assert store.missing_units("head", 0, range(6)) == [absent, absent + 3]


def test_the_manifest_of_a_placed_store_is_of_version_2_and_others_stay_readable_for_old_programs(
    make_store: MakeStore, placement: Placement
) -> None:
    absmax = {"scales": ScaleChoice.ABSMAX}
    placed = json.loads((make_store("placed", placement=placement, **absmax) / "manifest.json").read_text())
    assert (placed["format_version"], placed["node_weights"]) == (2, [3, 2, 1])
    plain = json.loads((make_store("plain", nodes=3, **absmax) / "manifest.json").read_text())
    assert plain["format_version"] == 1
    assert "node_weights" not in plain


@pytest.mark.usefixtures("checkpoint")
def test_shard_obeys_a_file_or_another_store(
    tmp_path: Path, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("placement.json").write_text(render_placement(placement))
    done = CliRunner().invoke(shard, ["odd", "--placement", "placement.json"])
    assert done.exit_code == 0, done.exception
    assert done.stdout.splitlines()[-1] == "mpirun -n 3 dist-moe run -m odd-q4-3-placed"
    again = CliRunner().invoke(shard, ["odd", "--placement", "odd-q4-3-placed", "-o", "again", "--quiet"])
    assert again.exit_code == 0, again.exception
    assert (
        read_manifest(Path("again/manifest.json")).files == read_manifest(Path("odd-q4-3-placed/manifest.json")).files
    )
    shown = CliRunner().invoke(inspect, ["again", "--json"])
    facts = json.loads(shown.stdout)["store"]
    assert (facts["node_weights"], facts["chunk_copies"]["most"]) == ([3, 2, 1], 3)


def test_a_missing_shard_is_brought_by_the_command_that_knows_the_placement(
    make_store: MakeStore, placement: Placement
) -> None:
    directory = make_store("placed", placement=placement)
    (directory / "shard-00002-of-00003.safetensors").unlink()
    with pytest.raises(StoreError, match=rf"dist-moe shard odd --placement {directory} --quant q4 --group-size 32 -o"):
        Store.open(directory).require("head", 0, [1])


@pytest.mark.parametrize("option", [("--nodes", "3"), ("--experts", "whole")])
def test_a_placement_leaves_nothing_to_say_of_nodes_and_experts(option: tuple[str, str]) -> None:
    done = CliRunner().invoke(shard, ["odd", "--placement", "placement.json", *option])
    assert isinstance(done.exception, UsageError)
    assert f"leave out {option[0]} or --placement" in str(done.exception)


def test_a_placement_of_another_model_is_refused(placement: Placement, checkpoint: Checkpoint) -> None:
    check_placement(placement, checkpoint.config, 32)
    other = replace(placement, counts=replace(placement.counts, heads=9))
    with pytest.raises(UsageError, match=r"does not fit this model: it has 3 layers .* 9 query heads.*dist-moe place"):
        check_placement(other, checkpoint.config, 32)


def test_a_unit_without_a_node_is_named(placement: Placement, checkpoint: Checkpoint) -> None:
    first = placement.shards[0]
    emptied = replace(first, chunks=(LayerRuns(0, checkpoint.config.layers, ()),))
    with pytest.raises(UsageError, match=r"gives layer 0, expert \d, chunk \d to no node"):
        check_placement(replace(placement, shards=(emptied, *placement.shards[1:])), checkpoint.config, 32)


def test_heads_come_with_their_k_and_v(placement: Placement, checkpoint: Checkpoint) -> None:
    first = replace(placement.shards[0], kv_heads=())
    others = [replace(shard, kv_heads=((0, checkpoint.config.kv_heads),)) for shard in placement.shards[1:]]
    with pytest.raises(UsageError, match="gives node 1 heads without K and V"):
        check_placement(replace(placement, shards=(first, *others)), checkpoint.config, 32)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format_version": 9}, "'format_version' must be a whole number from 1 to 1, not 9"),
        ({"node_weights": [1, 1]}, "has 2 weights for 3 shards"),
        ({"node_weights": [0, 1, 1]}, "'node_weights' must hold whole numbers from 1"),
        ({"shards": []}, "has no shards"),
        ({"more": 1}, "has unknown keys: more"),
        ({"units": {}}, "units: has no 'heads'"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(
    placement: Placement, tmp_path: Path, change: dict[str, object], problem: str
) -> None:
    path = tmp_path / "placement.json"
    path.write_text(json.dumps(json.loads(render_placement(placement)) | change))
    with pytest.raises(StoreError) as caught:
        read_placement(path)
    assert str(path) in str(caught.value)
    assert problem in str(caught.value)
    assert "make one with dist-moe place MODEL" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"), [(None, "does not exist"), ("{", "is not valid JSON"), ("[]", "not a JSON")]
)
def test_what_is_no_placement_is_refused(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "placement.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(StoreError, match=problem):
        read_placement(path)
