"""Checksums in parts: every byte of every unit is read by exactly one part, and damage is found by exactly one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.store.layout import weight_layout
from dist_moe.store.manifest import COMMON_NAME
from dist_moe.store.reader import Store
from dist_moe.store.shares import checked_rows, damages_in_share
from helpers.tiny_store import ODD, run_convert

MORE_THAN_ROWS = 101


@pytest.fixture
def store(tmp_path: Path) -> Store:
    source = Checkpoint.open(ODD.write(tmp_path / "source"))
    run_convert(source, tmp_path / "store", nodes=2)
    return Store.open(tmp_path / "store")


def flip(store: Store, file: str, tensor: str, offset: int) -> None:
    at = weight_layout(store.manifest, file).first_byte[tensor] + offset
    with (store.directory / file).open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("parts", [1, 2, 3, 7, MORE_THAN_ROWS])
def test_the_parts_cover_everything_once(store: Store, parts: int) -> None:
    read = []
    for part in range(parts):
        damages, read_bytes = damages_in_share(store, part, parts)
        assert damages == []
        read.append(read_bytes)
    assert parts < MORE_THAN_ROWS or sum(len(tensor.rows) for tensor in checked_rows(store)) < parts
    assert sum(read) == sum(tensor.rows.nbytes for tensor in checked_rows(store))
    assert sum(read) > 0.9 * sum(entry.file_bytes for entry in store.manifest.files)


@pytest.mark.parametrize("parts", [1, 2, MORE_THAN_ROWS])
@pytest.mark.parametrize(
    ("file", "tensor", "offset", "unit"),
    [
        (COMMON_NAME, "embedding", 77, "tensor 'embedding' is damaged"),
        ("shard-00001-of-00002.safetensors", "layers.2.chunks", 3, "layer 2, expert 0, chunk 0 is damaged"),
        ("shard-00002-of-00002.safetensors", "layers.0.heads", -1, "layer 0, query head 5 is damaged"),
        ("shard-00002-of-00002.safetensors", "vocabulary", 0, "vocabulary block 2 is damaged"),
    ],
)
def test_a_flipped_byte_is_found_by_one_part(
    store: Store, parts: int, file: str, tensor: str, offset: int, unit: str
) -> None:
    rows = next(checked for checked in checked_rows(store) if (checked.file, checked.name) == (file, tensor))
    flip(store, file, tensor, offset % rows.rows.nbytes)
    found = [damage for part in range(parts) for damage in damages_in_share(store, part, parts)[0]]
    assert len(found) == 1
    assert found[0].startswith(f"{store.directory / file}: tensor '{tensor}'")
    assert unit in found[0]


def test_shards_that_are_elsewhere_are_not_read(store: Store) -> None:
    (store.directory / "shard-00001-of-00002.safetensors").unlink()
    there = Store.open(store.directory)
    assert {rows.file for rows in checked_rows(there)} == {COMMON_NAME, "shard-00002-of-00002.safetensors"}
    assert damages_in_share(there, 0, 1)[0] == []
