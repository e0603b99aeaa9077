"""The start-up agreement and the shared verification on the ranks that mpirun started."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.engine.runtime import EngineOptions, Runtime
from dist_moe.engine.start import verification
from dist_moe.engine.start.verification import verify_together
from dist_moe.kernels import Kernels, KvFormat, WeightFormat
from dist_moe.parallel.world import AgreedError, World
from dist_moe.store.convert import convert
from dist_moe.store.layout import weight_layout
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from helpers.tiny_model import TinyModel

pytestmark = pytest.mark.mpi
OPTIONS = EngineOptions(context=100)


@pytest.fixture
def directory(world: World, tmp_path: Path) -> Path:
    """One store for all ranks, made by the leader; a copy beside it of another model."""
    home = Path(world.gather_texts(str(tmp_path))[0])
    if world.is_leader:
        for name, seed in (("store", 1), ("other", 2)):
            source = Checkpoint.open(TinyModel(seed=seed).write(tmp_path / f"{name}-source"))
            convert(source, home / name, StoreOptions(format=WeightFormat.Q8, nodes=2), lambda *told: None)
        shutil.copytree(home / "store", home / "copy")
    world.barrier()
    return home / "store"


def refused(world: World, make: Callable[[], object]) -> AgreedError:
    """The error that all ranks must get alike."""
    with pytest.raises(AgreedError) as caught:
        make()
    assert len(set(world.gather_texts(str(caught.value)))) == 1
    return caught.value


def flip_byte(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def last(world: World) -> bool:
    return world.rank == world.size - 1


def expect_table(world: World, error: AgreedError, title: str) -> None:
    """All lines of a table that names the last rank."""
    assert error.exit_code == 3
    assert error.lines[0].startswith(f"rank {world.size - 1} on {world.hosts[-1]} differs from the other ranks in ")
    assert title in error.lines[0]
    assert sum(line.endswith("<- differs") for line in error.lines) == 1


@pytest.fixture
def others(world: World) -> None:
    """Skip on one rank alone, which cannot differ."""
    if world.size == 1:
        pytest.skip("needs two ranks")


@pytest.mark.usefixtures("others")
def test_other_options_on_a_rank(world: World, directory: Path) -> None:
    store = Store.open(directory)
    options = replace(OPTIONS, kv=KvFormat.Q8) if last(world) else OPTIONS
    expect_table(world, refused(world, lambda: Runtime(store, world, options)), "KV")


@pytest.mark.usefixtures("others")
def test_another_store_on_a_rank(world: World, directory: Path) -> None:
    store = Store.open(directory.with_name("other") if last(world) else directory)
    error = refused(world, lambda: Runtime(store, world, OPTIONS))
    expect_table(world, error, "manifest")
    assert "/other" in str(error)


@pytest.mark.usefixtures("others")
def test_other_bits_on_a_rank(world: World, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if last(world):
        monkeypatch.setattr(Kernels, "self_test", lambda self: 4711)
    store = Store.open(directory)
    error = refused(world, lambda: Runtime(store, world, OPTIONS))
    expect_table(world, error, "known answers")
    assert f"{4711:016x}" in str(error)


def test_a_refused_start_leaves_the_ranks_usable(world: World, directory: Path) -> None:
    store = Store.open(directory)
    if world.size > 1:
        refused(world, lambda: Runtime(store, world, replace(OPTIONS, context=100 + last(world))))
    engine = Runtime(store, world, replace(OPTIONS, check="full"))
    engine.stop() if world.is_leader else engine.serve()


def test_the_ranks_of_a_host_share_the_verification(world: World, directory: Path) -> None:
    store = Store.open(directory)
    read = [int(text) for text in world.gather_texts(str(verify_together(world, store)))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "share_of_rank", lambda *_: (0, 1))
        whole_bytes = verify_together(world, store)
    for node in range(world.nodes):
        assert sum(n for rank, n in enumerate(read) if world.node_of_rank[rank] == node) == whole_bytes
    assert world.nodes == world.size or max(read) < whole_bytes


def test_ranks_that_see_another_copy_verify_it_all(world: World, directory: Path) -> None:
    store = Store.open(directory.with_name("copy") if last(world) else directory)
    read = [int(text) for text in world.gather_texts(str(verify_together(world, store)))]
    assert read[-1] >= max(read)


@pytest.mark.parametrize("tensor", ["layers.0.chunks", "layers.1.heads", "vocabulary"])
def test_a_byte_that_flips_is_named(world: World, directory: Path, tensor: str) -> None:
    store = Store.open(directory)
    name = store.present_files[-1]
    world.barrier()  # opening a small store reads all of it
    if world.is_leader:
        flip_byte(directory / name, weight_layout(store.manifest, name).first_byte[tensor] + 5)
    world.barrier()
    Runtime(store, world, OPTIONS)
    error = refused(world, lambda: Runtime(store, world, replace(OPTIONS, check="full")))
    assert error.exit_code == 2
    assert len(error.lines) == 1
    assert f"{directory / name}: tensor '{tensor}'" in str(error)
    assert "verifying the store: " in str(error) or world.size == 1
