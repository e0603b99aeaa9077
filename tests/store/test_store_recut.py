"""Stores cut anew: every byte as if made from the source, checked on the way, and continued after an interruption."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import dist_moe
from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.cli.main import execute
from dist_moe.cli.reshard import reshard
from dist_moe.cli.shard_progress import ShardProgress
from dist_moe.errors import Interrupted, PlaceError, StoreError, UsageError
from dist_moe.kernels import WeightFormat
from dist_moe.store import convert as conversion
from dist_moe.store.convert import Conversion
from dist_moe.store.placement import Placement
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from dist_moe.store.recut import recut
from helpers.private_memory import LARGE, LARGE_BYTES, peak_bytes
from helpers.tiny_model import TinyModel
from helpers.tiny_store import Crash, contents, crash_on_third, ignore, placement_of, run_convert

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(dist_moe.__file__).parents[1])}
MakeStore = Callable[..., Path]


def run_recut(directory: Path, destination: Path, **options: object) -> Conversion:
    changed = replace(StoreOptions(threads=1, allow_nonfinite=True), **options)  # type: ignore[arg-type]
    return recut(Store.open(directory), destination, changed, ignore)


def run_reshard(*arguments: object) -> Result:
    return CliRunner().invoke(reshard, [str(argument) for argument in arguments])


@pytest.fixture
def placement(checkpoint: Checkpoint) -> Placement:
    return placement_of(checkpoint)


@pytest.mark.parametrize(("fmt", "group"), [(fmt, 32) for fmt in WeightFormat] + [(WeightFormat.Q4, 0)])
def test_another_cut_is_the_store_made_from_the_source(
    tmp_path: Path, make_store: MakeStore, placement: Placement, fmt: WeightFormat, group: int
) -> None:
    cuts: list[dict[str, object]] = [{"nodes": 1}, {"nodes": 4}, {"nodes": 3, "experts": "sliced"}, {"nodes": 6}]
    if group:
        cuts.append({"placement": placement})
    shared = {"format": fmt, "group_size": group}
    made = [make_store(f"made{number}", **shared, **cut) for number, cut in enumerate(cuts)]
    for number, cut in enumerate(cuts):
        expected = contents(made[number])
        for start, source in enumerate(made):
            run_recut(source, tmp_path / f"{start} to {number}", **cut)
            assert contents(tmp_path / f"{start} to {number}") == expected


def test_the_source_is_not_needed(tmp_path: Path, checkpoint: Checkpoint, make_store: MakeStore) -> None:
    store, expected = make_store("store"), contents(make_store("expected", nodes=2))
    for path in sorted(checkpoint.path.iterdir()):
        path.unlink()
    run_recut(store, tmp_path / "new", nodes=2)
    assert contents(tmp_path / "new") == expected


def test_counts_of_weights_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    model = TinyModel(dense_layers=())
    tensors = model.tensors()
    for name, place in (("layers.1.self_attn.v_proj", (5, 5)), ("layers.0.mlp.experts.3.down_proj", (1, 7))):
        tensors[f"model.{name}.weight"][place] = float("nan")
    tensors["lm_head.weight"][5, 0] = tensors["model.norm.weight"][3] = float("inf")
    source = Checkpoint.open(model.write(tmp_path / "poisoned", tensors))
    for nodes in (1, 2, 4):
        run_convert(source, tmp_path / f"made{nodes}", nodes=nodes, allow_nonfinite=True)
        for start in {1, nodes}:
            new = run_recut(tmp_path / f"made{start}", tmp_path / f"{start} to {nodes}", nodes=nodes)
            assert sum(new.manifest.nonfinite.values()) == 4
            assert contents(tmp_path / f"{start} to {nodes}") == contents(tmp_path / f"made{nodes}")


@pytest.mark.parametrize(("file", "unit"), [("shard-00002-of-00002.safetensors", "chunk"), ("common.safetensors", "")])
def test_a_damaged_unit_is_found_on_the_way(tmp_path: Path, make_store: MakeStore, file: str, unit: str) -> None:
    directory = make_store(nodes=2)
    store = Store.open(directory)
    sealed = store.sealed_unit("chunk", 0, 8) if unit else store.sealed_common()[0]
    assert sealed.path.name == file
    place = (directory / file).read_bytes().index(sealed.data.tobytes()) + 70
    with (directory / file).open("r+b") as stream:  # under the open store, whose check is over
        stream.seek(place)
        stream.write(bytes([int(sealed.data[70]) ^ 4]))
    with pytest.raises(StoreError, match=r"is damaged: its bytes have checksum") as caught:
        recut(store, tmp_path / "new", StoreOptions(nodes=3, threads=1), ignore)
    assert f"{directory / file}: tensor {sealed.tensor!r}" in str(caught.value)
    assert sealed.unit in str(caught.value)
    with pytest.raises(StoreError, match="is an incomplete store"):
        Store.open(tmp_path / "new")
    assert not [path for path in (tmp_path / "new").iterdir() if path.name.endswith(".partial")]


def test_an_interrupted_one_is_continued(
    tmp_path: Path, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, expected = make_store("store", nodes=2), contents(make_store("expected", nodes=3))
    with monkeypatch.context() as patch:
        patch.setattr(conversion._Run, "_pack", crash_on_third(conversion._Run._pack))
        with pytest.raises(Crash):
            run_recut(store, tmp_path / "new", nodes=3)
    with pytest.raises(StoreError, match=r"incomplete store .*reshard"):
        Store.open(tmp_path / "new")
    again = run_recut(store, tmp_path / "new", nodes=3)
    assert again.kept_files == ("common.safetensors", "shard-00001-of-00003.safetensors")
    assert contents(tmp_path / "new") == expected
    assert run_recut(store, tmp_path / "new", nodes=3).written_files == ()


def test_shard_goes_on_where_reshard_stopped(
    tmp_path: Path, checkpoint: Checkpoint, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store("store")
    with monkeypatch.context() as patch:
        patch.setattr(conversion._Run, "_pack", crash_on_third(conversion._Run._pack))
        with pytest.raises(Crash):
            run_recut(store, tmp_path / "new", nodes=3)
    assert len(run_convert(checkpoint, tmp_path / "new", nodes=3).kept_files) == 2


def test_a_shard_that_is_not_here_is_named_before_anything_is_written(tmp_path: Path, make_store: MakeStore) -> None:
    store = make_store(nodes=3)
    (store / "shard-00002-of-00003.safetensors").unlink()
    with pytest.raises(StoreError, match=r"shard-00002-of-00003.safetensors is missing: it holds layer 0"):
        run_recut(store, tmp_path / "new", nodes=2)
    assert not (tmp_path / "new").exists()


def test_the_store_itself_is_never_overwritten(make_store: MakeStore) -> None:
    store = make_store(nodes=2)
    before = contents(store)
    link = store.with_name("link")
    link.symlink_to(store)
    for name in (store, link, store / ".." / store.name):
        with pytest.raises(UsageError, match="is the store that is read"):
            run_recut(store, name, nodes=3, force=True)
    assert contents(store) == before


def test_another_store_is_replaced_only_by_force(tmp_path: Path, make_store: MakeStore) -> None:
    store, other = make_store("store"), make_store("other", nodes=2, format=WeightFormat.Q8)
    with pytest.raises(
        StoreError, match=r"made with other options \(weights q8, not q4, nodes 2, not 3, scales absmax, not mse\)"
    ):
        run_recut(store, other, nodes=3)
    run_recut(store, other, nodes=3, force=True)
    assert contents(other) == contents(make_store("expected", nodes=3))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("dear")
    with pytest.raises(PlaceError, match="is not empty and not a store"):
        run_recut(store, tmp_path / "foreign", nodes=3, force=True)


def test_a_full_disk_is_said_before_and_while_writing(
    tmp_path: Path, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    with monkeypatch.context() as patch:
        patch.setattr(conversion.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        result = run_reshard(store, "--nodes", 2, "-o", tmp_path / "new")
    assert re.search(r"disk is too full: \d+ bytes needed, 1000 free; make room or choose", str(result.exception))
    assert run_reshard(store, "--nodes", 2, "-o", tmp_path / "new").exit_code == 0


def test_the_command(tmp_path: Path, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_store("store", nodes=2, experts="sliced")
    done = run_reshard("store", "--nodes", 3)
    assert done.exit_code == 0, done.exception
    assert done.stdout.splitlines()[-1] == "mpirun -n 3 dist-moe run -m odd-q4-3"
    assert Store.open("odd-q4-3").manifest.experts == "sliced"
    assert "odd-q4-3: done" in run_reshard("store", "--nodes", 3).stdout
    done = run_reshard("odd-q4-3", "--placement", "store", "-o", "placed", "--quiet")
    assert (done.exit_code, Store.open("placed").manifest.experts) == (0, "placed")
    assert run_reshard("placed", "--nodes", 1).exit_code == 0
    assert Store.open("odd-q4-1").manifest.experts == "whole"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["store"], "reshard needs --nodes N, or --placement FILE"),
        (["store", "--nodes", "7"], "this model has 6 query heads"),
        (["store", "--nodes", "2", "--placement", "store"], "leave out --nodes or --placement"),
        (["odd", "--nodes", "2"], "is a Hugging Face directory, not a store"),
        (["nowhere", "--nodes", "2"], "does not exist"),
    ],
)
def test_wrong_options_are_one_sentence(
    tmp_path: Path, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_store("store")
    with pytest.raises((UsageError, StoreError), match=message) as caught:
        execute(["reshard", *words])
    assert "\n" not in str(caught.value)


def test_ctrl_c_ends_with_130(make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardProgress, "__call__", interrupt)
    result = run_reshard(make_store(), "--nodes", 2, "-o", tmp_path / "new")
    assert isinstance(result.exception, Interrupted)


def test_private_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    run_convert(Checkpoint.open(LARGE.write(tmp_path / "large")), tmp_path / "store", format=WeightFormat.F32)
    assert sum(path.stat().st_size for path in (tmp_path / "store").iterdir()) > LARGE_BYTES
    work = "recut(opened, there, StoreOptions(nodes=3, threads=1), watch)"
    assert peak_bytes("Store.open(source)", work, tmp_path / "store", tmp_path / "new", ENVIRONMENT) < 20e6
