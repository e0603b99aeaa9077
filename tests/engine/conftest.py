"""Stores and engines for the tests of the engine; one rank, no MPI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.demo import demo_model_directory
from dist_moe.engine.runtime import EngineOptions, Runtime
from dist_moe.kernels import WeightFormat
from dist_moe.parallel.world import World
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from helpers.tiny_model import TinyModel

MakeStore = Callable[..., Store]
MakeRuntime = Callable[..., Runtime]


def ignore_progress(done_bytes: int, total_bytes: int, what: str) -> None:
    """Conversion tells its progress to someone."""


@pytest.fixture(scope="session")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    """make_store(source directory, "q4", nodes=1): a store of a checkpoint, made once per session."""
    made: dict[tuple[Path, str, int, bool, str], Store] = {}

    def make(
        source: Path, weights: str = "f32", nodes: int = 1, allow_nonfinite: bool = False, experts: str = "whole"
    ) -> Store:
        key = (source, weights, nodes, allow_nonfinite, experts)
        if key not in made:
            directory = tmp_path_factory.mktemp("store") / "store"
            options = StoreOptions(
                format=WeightFormat.parse(weights), nodes=nodes, allow_nonfinite=allow_nonfinite, experts=experts
            )
            convert(Checkpoint.open(source), directory, options, ignore_progress)
            made[key] = Store.open(directory)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint with a MoE layer and a dense one."""
    return TinyModel().write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def demo_store(make_store: MakeStore) -> Store:
    """The demo model in f32."""
    return make_store(demo_model_directory())


@pytest.fixture
def make_engine() -> Iterator[MakeRuntime]:
    """make_engine(store, **options): an engine on one rank, closed after the test."""
    with ExitStack() as stack:

        def make(store: Store, **options: object) -> Runtime:
            engine = Runtime(store, World(), EngineOptions(**{"context": 512, **options}))
            stack.callback(engine.kernels.close)
            return engine

        yield make
