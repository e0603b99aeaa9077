"""Interruptions: nothing half-made looks whole, and a rerun goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.errors import StoreError
from dist_moe.store import convert as conversion
from dist_moe.store import writer
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from helpers.tiny_store import Crash, contents, crash_on_third, run_convert

MakeStore = Callable[..., Path]


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Die at the step-th rename, or (odd steps) right after it, leaving files as they are."""
    steps = iter(range(10_000))
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if next(steps) == step:
            raise Crash
        result = real(self, target)
        if next(steps) == step:
            raise Crash
        return result

    monkeypatch.setattr(Path, "replace", replace)
    # A dead process tidies nothing up.
    monkeypatch.setattr(writer.FileWriter, "__exit__", lambda *_: None)


def test_a_crash_at_any_rename_leaves_an_incomplete_store_that_a_rerun_finishes(
    tmp_path: Path, checkpoint: Checkpoint, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(make_store("expected", nodes=2))
    kept = []
    for step in range(100):
        directory = tmp_path / f"crash{step}"
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            try:
                run_convert(checkpoint, directory, nodes=2)
            except Crash:
                pass
            else:
                break
        if (directory / "manifest.json").exists():
            assert contents(directory).items() >= expected.items()
        else:
            with pytest.raises(StoreError, match=r"incomplete|not a store"):
                Store.open(directory)
        made = run_convert(checkpoint, directory, nodes=2)
        kept.append(len(made.kept_files))
        assert contents(directory) == expected | {
            name: data for name, data in contents(directory).items() if name == ".progress.json"
        }
        Store.open(directory, check="full")
    # Renames: the record before the first and after each of 4 files, the files, the manifest.
    assert step == 2 * (1 + 2 * 4 + 1)
    assert sorted(kept) == kept
    assert set(kept) == {0, 1, 2, 3, 4}


def test_finished_shards_are_not_written_again(
    checkpoint: Checkpoint, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(conversion._Run, "_pack", crash_on_third(conversion._Run._pack))
        with pytest.raises(Crash):
            run_convert(checkpoint, tmp_path / "store", nodes=3)
    inode = (tmp_path / "store" / "shard-00001-of-00003.safetensors").stat().st_ino
    made = run_convert(checkpoint, tmp_path / "store", nodes=3)
    assert made.kept_files == ("common.safetensors", "shard-00001-of-00003.safetensors")
    assert made.written_files == (
        "shard-00002-of-00003.safetensors",
        "shard-00003-of-00003.safetensors",
        "config.json",
    )
    assert (tmp_path / "store" / "shard-00001-of-00003.safetensors").stat().st_ino == inode
    assert contents(tmp_path / "store") == contents(make_store("whole", nodes=3))


def test_the_same_options_again_change_nothing_even_where_nothing_can_be_written(
    checkpoint: Checkpoint, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_store(nodes=2)
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    monkeypatch.setattr(conversion, "store_lock", None)
    made = run_convert(checkpoint, directory, nodes=2)
    assert made.written_files == ()
    assert len(made.kept_files) == 4
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


@pytest.mark.parametrize("name", ["common.safetensors", "shard-00002-of-00002.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_missing_or_damaged_file_is_made_again(
    checkpoint: Checkpoint, make_store: MakeStore, name: str, damage: str
) -> None:
    directory = make_store(nodes=2)
    expected, path = contents(directory), directory / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] if damage == "truncated" else data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    if damage == "missing":
        path.unlink()
    made = run_convert(checkpoint, directory, nodes=2)
    assert made.written_files == (name,)
    assert contents(directory) == expected


def test_a_repair_that_is_interrupted_leaves_an_incomplete_store(
    checkpoint: Checkpoint, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_store(nodes=2)
    expected = contents(directory)
    for name in ("shard-00001-of-00002.safetensors", "shard-00002-of-00002.safetensors", "common.safetensors"):
        (directory / name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(conversion._Run, "_pack", crash_on_third(conversion._Run._pack))
        with pytest.raises(Crash):
            run_convert(checkpoint, directory, nodes=2)
    with pytest.raises(StoreError, match="incomplete"):
        Store.open(directory)
    assert run_convert(checkpoint, directory, nodes=2).written_files == ("shard-00002-of-00002.safetensors",)
    assert contents(directory) == expected


def test_an_interrupted_run_tidies_up_and_keeps_what_is_finished(
    tmp_path: Path, checkpoint: Checkpoint, make_store: MakeStore
) -> None:
    def interrupt(done_bytes: int, total_bytes: int, what: str) -> None:
        if what.startswith("shard-00002"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversion.convert(checkpoint, tmp_path / "store", StoreOptions(nodes=2, threads=1), interrupt)
    names = {path.name for path in (tmp_path / "store").iterdir()}
    assert names == {".progress.json", "common.safetensors", "shard-00001-of-00002.safetensors"}
    assert run_convert(checkpoint, tmp_path / "store", nodes=2).kept_files == (
        "common.safetensors",
        "shard-00001-of-00002.safetensors",
    )
    assert contents(tmp_path / "store") == contents(make_store("fresh", nodes=2))
