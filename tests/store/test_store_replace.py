"""Replacing a store takes --force, which removes nothing foreign; a changed source is noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.errors import StoreError
from dist_moe.kernels import WeightFormat
from dist_moe.store import convert as conversion
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from helpers.tiny_store import ODD, contents, run_convert

MakeStore = Callable[..., Path]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": WeightFormat.Q8}, "weights q4, not q8, scales mse, not absmax"),
        ({"group_size": 0}, "group_size 32, not 0"),
        ({"nodes": 3}, "nodes 2, not 3"),
        ({"experts": "sliced"}, "experts whole, not sliced"),
    ],
)
def test_other_options_need_force(
    checkpoint: Checkpoint, make_store: MakeStore, options: dict[str, object], message: str
) -> None:
    directory = make_store(nodes=2)
    before = contents(directory)
    wanted = {"nodes": 2, **options}
    with pytest.raises(StoreError, match=rf"made with other options \({message}\).*--force"):
        run_convert(checkpoint, directory, **wanted)
    assert contents(directory) == before
    run_convert(checkpoint, directory, force=True, **wanted)
    assert contents(directory) == contents(make_store("fresh", **wanted))


def test_another_source_needs_force(tmp_path: Path, make_store: MakeStore) -> None:
    directory = make_store()
    other = Checkpoint.open(ODD.write(tmp_path / "trained" / "odd", seed=2))
    with pytest.raises(StoreError, match="source odd in another version"):
        run_convert(other, directory)
    run_convert(other, directory, force=True)


def test_the_files_of_an_interrupted_run_with_other_options_need_force(
    tmp_path: Path, checkpoint: Checkpoint, make_store: MakeStore
) -> None:
    def interrupt(done_bytes: int, total_bytes: int, what: str) -> None:
        if what.startswith("shard-00002"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversion.convert(checkpoint, tmp_path / "store", StoreOptions(nodes=3, threads=1), interrupt)
    with pytest.raises(StoreError, match="nodes 3, not 2"):
        run_convert(checkpoint, tmp_path / "store", nodes=2)
    run_convert(checkpoint, tmp_path / "store", nodes=2, force=True)
    assert contents(tmp_path / "store") == contents(make_store("fresh", nodes=2))


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"format_version": 9}'])
def test_a_store_that_cannot_be_understood_needs_force(
    checkpoint: Checkpoint, make_store: MakeStore, damage: bytes
) -> None:
    directory = make_store(nodes=4)
    (directory / "manifest.json").write_bytes(damage)
    with pytest.raises(StoreError, match="or replace the store with --force"):
        run_convert(checkpoint, directory)
    run_convert(checkpoint, directory, force=True)
    assert contents(directory) == contents(make_store("fresh"))


def test_force_removes_only_what_belongs_to_a_store(checkpoint: Checkpoint, make_store: MakeStore) -> None:
    directory = make_store(nodes=3)
    (directory / "notes.txt").write_text("mine")
    (directory / "more").mkdir()
    run_convert(checkpoint, directory, nodes=1, force=True)
    assert (directory / "notes.txt").read_text() == "mine"
    assert {path.name for path in directory.glob("shard-*")} == {"shard-00001-of-00001.safetensors"}


def test_a_directory_that_is_no_store_is_never_touched(tmp_path: Path, checkpoint: Checkpoint) -> None:
    before = contents(tmp_path / "odd")
    for force in (False, True):
        with pytest.raises(StoreError, match=r"is not empty and not a store \(it holds config.json\)"):
            run_convert(checkpoint, tmp_path / "odd", force=force)
        assert contents(tmp_path / "odd") == before
        with pytest.raises(StoreError, match="cannot be used as a directory"):
            run_convert(checkpoint, tmp_path / "odd" / "config.json", force=force)


def test_a_tokenizer_that_changed_in_the_source_is_copied_again(
    tmp_path: Path, checkpoint: Checkpoint, make_store: MakeStore
) -> None:
    (tmp_path / "odd" / "tokenizer.json").write_text("{}")
    (tmp_path / "odd" / "chat_template.jinja").write_text("hello")
    directory = make_store()
    (tmp_path / "odd" / "tokenizer.json").write_text('{"better": 1}')
    (tmp_path / "odd" / "chat_template.jinja").unlink()
    made = run_convert(checkpoint, directory)
    assert made.written_files == ("tokenizer.json",)
    assert (directory / "tokenizer.json").read_text() == '{"better": 1}'
    assert not (directory / "chat_template.jinja").exists()
    Store.open(directory, check="full")
