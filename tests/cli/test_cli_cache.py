"""The cache of packed models mends itself, and advises only what `run` can do."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_moe.cli.shard_progress import ShardProgress
from dist_moe.engine.start.job import local_store
from dist_moe.errors import DistMoeError, PlaceError
from dist_moe.kernels import WeightFormat
from dist_moe.parallel.world import World
from dist_moe.store import convert as convert_module
from dist_moe.store import models, state
from dist_moe.store.models import ModelSource
from dist_moe.store.reader import Store
from helpers.tiny_model import TinyModel
from helpers.tiny_store import contents


class Alone:
    """One rank, without MPI."""

    local_rank = node = 0
    node_of_rank = (0,)

    def sleep_until_all(self) -> None: ...

    def agree(self, error: DistMoeError | None, phase: str) -> None:
        if error:
            raise error

    def gather_texts(self, text: str) -> list[str]:
        return [text]


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Pack the model into the cache, as `run` does; returns the store and what was logged."""
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "cache"))
    source = TinyModel(layers=1, dense_layers=()).write(tmp_path / "hf")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dist_moe")
    logger.addHandler(handler)

    def run(*, full_check: bool = False) -> tuple[Path, list[str]]:
        lines.clear()
        world: World = Alone()  # type: ignore[assignment]
        return local_store(
            world, ModelSource(source, WeightFormat.Q4), full_check=full_check, show=ShardProgress
        ), list(lines)

    yield run
    logger.removeHandler(handler)


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"format_version": 9}', b"cut"])
def test_a_damaged_manifest_is_packed_again_with_one_line(pack, damage: bytes) -> None:
    directory, lines = pack()
    assert lines == []
    before, manifest = contents(directory), directory / "manifest.json"
    manifest.write_bytes(before["manifest.json"][:100] if damage == b"cut" else damage)
    assert pack()[0] == directory
    assert contents(directory) == before
    manifest.write_bytes(damage)
    (line,) = pack()[1]
    assert line.startswith(f"a packed model in the cache is damaged and is packed again: {manifest}: ")
    assert "--force" not in line
    assert "-o" not in line.split()
    assert pack()[1] == []


def test_a_damaged_or_missing_file_is_packed_again_with_one_line(pack) -> None:
    directory, _ = pack()
    before = contents(directory)
    (directory / "common.safetensors").unlink()
    (directory / "config.json").write_text("{}")
    _, lines = pack()
    assert lines == [f"{directory}: damaged or missing, packed again: common.safetensors, config.json"]
    assert contents(directory) == before


def test_a_full_check_reads_large_files_too(pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "FULL_CHECK_BYTES", 0)
    directory, _ = pack()
    before, shard = contents(directory), directory / "shard-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    assert pack()[1] == []
    assert pack(full_check=True)[1] == [f"{directory}: damaged or missing, packed again: {shard.name}"]
    assert contents(directory) == before


def test_an_interrupted_store_is_continued_without_a_word(pack) -> None:
    directory, _ = pack()
    (directory / "manifest.json").rename(directory / ".progress.json")
    assert pack()[1] == []
    Store.open(directory)


def test_a_cache_that_cannot_be_written_names_the_variable(
    pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        PlaceError, match=r"cannot be used as a directory .* or set DIST_MOE_CACHE to another directory$"
    ):
        pack()
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(
        PlaceError, match=r"too full: .* 10 free; make room or set DIST_MOE_CACHE to another directory$"
    ):
        pack()


def test_what_is_not_ours_is_left_alone_in_the_cache(pack) -> None:
    directory, _ = pack()
    (directory / "manifest.json").unlink()
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(PlaceError, match=r"is not empty and not a store .* remove it or set DIST_MOE_CACHE"):
        pack()
    assert (directory / "notes.txt").read_text() == "mine"


def test_without_a_home_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIST_MOE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(models.Path, "home", homeless)
    with pytest.raises(DistMoeError, match="set DIST_MOE_CACHE"):
        models.cache_directory()
    assert os.environ.get("DIST_MOE_CACHE") is None
