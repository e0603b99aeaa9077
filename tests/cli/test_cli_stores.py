"""A store in the wrong place, damaged or in part: the commands say what it is and what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.cli.inspect import inspect
from dist_moe.cli.main import execute
from dist_moe.cli.models import find_model
from dist_moe.demo import demo_model_directory
from dist_moe.errors import PlaceError, StoreError, UsageError
from dist_moe.store.reader import Store
from helpers.command_options import MODEL
from helpers.tiny_model import TinyModel
from helpers.tiny_store import run_convert


@pytest.fixture(scope="module")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stores") / "demo"
    run_convert(Checkpoint.open(demo_model_directory()), directory, nodes=2)
    return directory


@pytest.fixture
def tiny(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(TinyModel(layers=2).write(tmp_path / "hf"))


def test_a_store_is_not_packed_again(demo_store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a store already: run it with dist-moe run -m") as caught:
        execute(["shard", str(demo_store), "-o", str(tmp_path / "x")])
    assert str(demo_store) in str(caught.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_stores_small_files_are_checked_before_they_are_parsed(demo_store: Path, name: str, damage: str) -> None:
    path = demo_store / name
    before = path.read_bytes()
    words = {"cut": "is truncated", "flipped": "has checksum", "missing": "is missing"}[damage]
    try:
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(before[:-7] if damage == "cut" else bytes([before[0] ^ 1]) + before[1:])
        source = find_model(replace(MODEL, model=str(demo_store)))
        for attempt in (source.read_config, lambda: execute(["run", "-m", str(demo_store), "--print-config"])):
            with pytest.raises(StoreError) as caught:
                attempt()
            assert str(caught.value).startswith(f"{path}: {words}")
            assert "copy it again from another machine" in str(caught.value) or damage == "missing"
            assert "the dist-moe shard command" in str(caught.value)
    finally:
        path.write_bytes(before)
    assert source.read_config().layers == 4


def test_an_unreadable_file_of_a_store_says_what_to_do(tiny: Checkpoint, tmp_path: Path) -> None:
    run_convert(tiny, tmp_path / "store")
    common = tmp_path / "store" / "common.safetensors"
    common.unlink()
    common.symlink_to(common.name)  # a circle cannot be read, not even by root
    with pytest.raises(StoreError, match=r"common\.safetensors: cannot be read .*; allow reading it, or copy it again"):
        Store.open(tmp_path / "store")


def test_the_name_of_the_source_is_said_to_be_one(tmp_path: Path) -> None:
    own = Checkpoint.open(TinyModel(layers=1, dense_layers=()).write(tmp_path / "demo"))
    run_convert(own, tmp_path / "store", nodes=2)
    (tmp_path / "store" / "shard-00002-of-00002.safetensors").unlink()
    with pytest.raises(StoreError) as caught:
        Store.open(tmp_path / "store").require("head", 0, range(8))
    assert "or run: dist-moe shard demo --nodes 2" in str(caught.value)
    assert str(caught.value).endswith("(demo is the source's name: give its path, or nothing for the bundled demo)")


def test_a_place_that_cannot_hold_a_store_names_the_flag(tiny: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PlaceError, match=r"cannot be used as a directory .* or choose another -o$"):
        execute(["shard", str(tiny.path), "-o", str(tmp_path / "file")])


# ---- inspect ----


def verified(directory: Path, *more: str) -> list[str]:
    done = CliRunner().invoke(inspect, [str(directory), "--verify", *more])
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_a_missing_shard_is_said_in_the_last_line(tiny: Checkpoint, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run_convert(tiny, store, nodes=4)
    assert verified(store)[-1] == "verified: every checksum agrees"
    second, third = (f"shard-0000{shard}-of-00004.safetensors" for shard in (2, 3))
    (store / second).unlink()
    lines = verified(store)
    assert lines[-1] == f"verified: 3 of 4 shards are here and agree; {second} is not on this machine"
    assert "totals of what is on this machine" in lines
    (store / third).unlink()
    assert verified(store)[-1] == (
        f"verified: 2 of 4 shards are here and agree; {second}, {third} are not on this machine"
    )
    first = store / "shard-00001-of-00004.safetensors"
    assert verified(first)[-1] == "verified: every checksum agrees"
    present = [file["present"] for file in json.loads("\n".join(verified(store, "--json")))["files"]]
    assert present.count(False) == 2


def test_the_table_is_as_wide_as_its_names(tiny: Checkpoint) -> None:
    done = CliRunner().invoke(inspect, [str(tiny.path)])
    lines = [line for line in done.output.splitlines() if line.startswith("  model.")]
    assert max(len(line.split()[0]) for line in lines) > 32
    assert {line.index(" F32 ") for line in lines} == {lines[0].index(" F32 ")}
    assert {line.index("[") for line in lines} == {lines[0].index("[")}
    assert len({len(line) for line in lines}) == 1
