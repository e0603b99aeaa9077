"""The mapped store: aligned views without copies, and one clear sentence for whatever is wrong."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.errors import StoreError
from dist_moe.store import reader
from dist_moe.store.manifest import read_manifest
from dist_moe.store.reader import Store
from dist_moe.store.units import UNIT_KINDS, unit_count
from helpers.tiny_store import ODD, run_convert

MakeStore = Callable[..., Path]


def test_units_are_aligned_read_only_views_at_their_addresses(make_store: MakeStore) -> None:
    store = Store.open(make_store(nodes=3, experts="sliced"))
    for layer in range(3):
        for kind in UNIT_KINDS:
            addresses = store.unit_addresses(kind, layer)
            count = unit_count(store.config, 32, kind, layer)
            assert (addresses.shape, addresses.dtype) == ((count,), np.uint64)
            for index in range(count):
                unit = store.unit(kind, layer, index)
                assert unit.ctypes.data % 64 == 0
                assert not unit.flags.writeable
                assert np.array_equal(unit, store.unit(kind, layer, index))
                if kind != "kv_head":
                    assert unit.ctypes.data == addresses[index]
            assert store.present_units(kind, layer).tolist() == list(range(count))
            store.require(kind, layer, range(count))
    assert all(store.common(f"layers.{layer}.mlp_norm").ctypes.data % 64 == 0 for layer in range(3))
    assert store.tokenizer_directory == store.directory


def test_views_outlive_the_store_object(make_store: MakeStore) -> None:
    store = Store.open(make_store())
    unit = store.unit("chunk", 0, 0)
    expected = unit.copy()
    del store
    assert np.array_equal(unit, expected)


def test_a_missing_shard_is_no_matter_until_its_units_are_required(make_store: MakeStore) -> None:
    directory = make_store(nodes=3)
    (directory / "shard-00002-of-00003.safetensors").unlink()
    store = Store.open(directory)
    assert store.missing_files == ("shard-00002-of-00003.safetensors",)
    assert "shard-00003-of-00003.safetensors" in store.present_files
    assert store.missing_units("head", 0, range(6)) == [2, 3]
    assert store.unit_addresses("head", 1).astype(bool).tolist() == [True, True, False, False, True, True]
    store.require("head", 0, [0, 1, 4, 5])
    with pytest.raises(StoreError) as caught:
        store.require("head", 1, range(6))
    text = str(caught.value)
    assert "shard-00002-of-00003.safetensors is missing: it holds layer 1, query head 2 and 1 more like it" in text
    assert f"dist-moe shard odd --nodes 3 --quant q4 --group-size 32 --experts whole -o {directory}" in text
    assert text.endswith("(odd is the source's name: give its path)")
    with pytest.raises(StoreError, match="layer 0, expert 2, chunk 0"):
        store.unit("chunk", 0, 2 * store.manifest.layer_chunks_per_expert(0))
    with pytest.raises(StoreError, match="vocabulary block 1"):
        store.require("vocabulary", 0, [0, 1])


def corrupt(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def test_a_directory_that_is_no_store_is_refused(tmp_path: Path, checkpoint: Checkpoint, make_store: MakeStore) -> None:
    (tmp_path / "empty").mkdir()
    store = make_store()
    for path, message in [
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "has no manifest.json, so it is not a store"),
        (tmp_path / "odd", "is a Hugging Face directory, not a store; run: dist-moe shard"),
        (store / "manifest.json", "is not a directory"),
    ]:
        with pytest.raises(StoreError) as caught:
            Store.open(path)
        assert message in str(caught.value)


def test_an_incomplete_store_says_how_to_finish_it(make_store: MakeStore) -> None:
    directory = make_store()
    (directory / "manifest.json").rename(directory / ".progress.json")
    with pytest.raises(StoreError, match=r"incomplete store .* repeat the dist-moe shard command"):
        Store.open(directory)


def test_without_its_common_file_a_store_is_refused(make_store: MakeStore) -> None:
    directory = make_store()
    (directory / "common.safetensors").unlink()
    with pytest.raises(
        StoreError, match=r"common.safetensors: is missing; copy it .* or repeat the dist-moe shard command"
    ):
        Store.open(directory)


@pytest.mark.parametrize(("change", "word"), [(-1, "truncated"), (-5000, "truncated"), (1, "too long")])
def test_a_file_of_another_size_names_both_sizes(make_store: MakeStore, change: int, word: str) -> None:
    path = make_store() / "shard-00001-of-00001.safetensors"
    size = path.stat().st_size
    path.write_bytes((path.read_bytes() + b"x")[: size + change])
    with pytest.raises(StoreError, match=f"is {word}: {size} bytes expected, {size + change} found"):
        Store.open(path.parent)


@pytest.mark.parametrize("position", [0, 3, 9, 200])
@pytest.mark.parametrize("name", ["common.safetensors", "shard-00001-of-00001.safetensors"])
def test_a_flipped_bit_in_a_header_is_noticed_whatever_the_size(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, name: str, position: int
) -> None:
    monkeypatch.setattr(reader, "FULL_CHECK_BYTES", 0)
    path = make_store() / name
    corrupt(path, position)
    with pytest.raises(StoreError, match="its header has checksum"):
        Store.open(path.parent)


def test_a_flipped_bit_in_weights_is_noticed_in_small_files_and_with_a_full_check(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store() / "shard-00001-of-00001.safetensors"
    store = Store.open(path.parent)
    position = int(store.unit_addresses("chunk", 2)[7]) - int(store.unit_addresses("head", 0)[0])
    header_bytes = store.manifest.files[1].header_bytes
    corrupt(path, header_bytes + position + 100)
    message = r"tensor 'layers.2.chunks', layer 2, expert 3, chunk 1 is damaged: .*checksum [0-9a-f]{16}, the file says"
    with pytest.raises(StoreError, match=message):
        Store.open(path.parent)
    monkeypatch.setattr(reader, "FULL_CHECK_BYTES", 0)
    Store.open(path.parent)
    with pytest.raises(StoreError, match=message):
        Store.open(path.parent, check="full")


def test_a_shard_of_another_store_is_noticed_by_its_header(
    tmp_path: Path, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Checkpoint.open(ODD.write(tmp_path / "fine-tuned" / "odd", seed=2))
    run_convert(other, tmp_path / "other")
    directory, name = make_store(), "shard-00001-of-00001.safetensors"
    assert (directory / name).stat().st_size == (tmp_path / "other" / name).stat().st_size
    shutil.copy(tmp_path / "other" / name, directory / name)
    monkeypatch.setattr(reader, "FULL_CHECK_BYTES", 0)
    with pytest.raises(StoreError, match="belongs to another store"):
        Store.open(directory)


def test_a_header_that_disagrees_with_the_manifest_is_noticed(make_store: MakeStore) -> None:
    directory = make_store(nodes=2)
    manifest = read_manifest(directory / "manifest.json")
    shards = (manifest.shards[1], manifest.shards[0])
    (directory / "manifest.json").write_text(dataclasses.replace(manifest, shards=shards).render())
    with pytest.raises(StoreError, match=r"tensor 'layers.0.chunks': U8 \[.*\] expected from the manifest, U8 \["):
        Store.open(directory)
