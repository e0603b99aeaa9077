"""The whole engine on the ranks that mpirun started, leader and followers, against one rank alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.engine.requests.request import Request, SamplingOptions
from dist_moe.engine.runtime import EngineOptions, Runtime
from dist_moe.errors import UsageError
from dist_moe.kernels import WeightFormat
from dist_moe.parallel.world import World
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from helpers.tiny_model import TinyModel, random_ids

pytestmark = pytest.mark.mpi


@pytest.fixture
def store(world: World, tmp_path: Path) -> Store:
    """One store for all ranks, made by the leader."""
    directory = Path(world.gather_texts(str(tmp_path))[0]) / "store"
    if world.is_leader:
        source = Checkpoint.open(TinyModel().write(tmp_path / "tiny"))
        convert(source, directory, StoreOptions(format=WeightFormat.Q8, nodes=2), lambda *told: None)
    world.barrier()
    return Store.open(directory)


@pytest.fixture
def poisoned_store(world: World, tmp_path: Path) -> Store:
    """An f32 store with a NaN in the last expert of layer 0, which the last rank owns if experts are whole."""
    directory = Path(world.gather_texts(str(tmp_path))[0]) / "store"
    if world.is_leader:
        tiny = TinyModel().write(tmp_path / "tiny")
        tensors = load_file(tiny / "model.safetensors")
        tensors["model.layers.0.mlp.experts.7.up_proj.weight"][5, 7] = np.nan
        save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
        options = StoreOptions(format=WeightFormat.F32, allow_nonfinite=True)
        convert(Checkpoint.open(tiny), directory, options, lambda *told: None)
    world.barrier()
    return Store.open(directory)


def on_all_ranks(
    world: World, store: Store, options: EngineOptions, lead: Callable[[Runtime], Any]
) -> tuple[Any, Any | None]:
    """What `lead` returns on one rank alone (on the leader, else None) and on all ranks together (likewise)."""
    alone = lead(Runtime(store, World(), options)) if world.is_leader else None
    engine = Runtime(store, world, options)
    if not world.is_leader:
        engine.serve()
        return None, None
    together = lead(engine)
    engine.stop()
    return alone, together


@pytest.mark.parametrize("layout", ["auto", "whole", "sliced", "shared"])
@pytest.mark.parametrize("exchange", ["allreduce", "alltoall"])
def test_generated_text_is_that_of_one_rank(world: World, store: Store, layout: str, exchange: str) -> None:
    requests = [
        Request(random_ids(3 + 20 * i, 300, seed=i), 12, SamplingOptions(temperature=0.4 * i, top_p=0.95, seed=i))
        for i in range(5)
    ]

    def lead(engine: Runtime) -> list[list[int]]:
        return [completion.ids for completion in engine.generate(requests)]

    options = EngineOptions(context=200, experts=layout, exchange=exchange, prefill_chunk=32)
    alone, together = on_all_ranks(world, store, options, lead)
    assert alone == together


def test_a_row_is_fetched_where_candidates_cannot_decide(world: World, store: Store, monkeypatch) -> None:
    monkeypatch.setattr("dist_moe.engine.requests.candidates.CANDIDATES", 4)
    request = Request(random_ids(5, 300), 25, SamplingOptions(temperature=20.0, seed=1))

    def lead(engine: Runtime) -> list[int]:
        return engine.generate([request])[0].ids

    alone, together = on_all_ranks(world, store, EngineOptions(context=200), lead)
    assert alone == together


def test_logits_are_those_of_one_rank(world: World, store: Store) -> None:
    def lead(engine: Runtime) -> np.ndarray:
        rows: list[np.ndarray] = []
        engine.logits(random_ids(75, 300), lambda rows_NV: rows.extend(rows_NV.copy()))
        return np.array(rows)

    alone, together = on_all_ranks(world, store, EngineOptions(context=200, prefill_chunk=20), lead)
    assert np.array_equal(alone, together) if world.is_leader else together is None


@pytest.mark.parametrize("exchange", ["allreduce", "alltoall"])
def test_a_fault_on_the_last_rank_ends_its_sequence_alone(world: World, poisoned_store: Store, exchange: str) -> None:
    requests = [Request((token, token + 1), 4) for token in range(0, 60, 4)]

    def lead(engine: Runtime) -> list[Any]:
        return [(done.ids, done.finish_reason, done.error) for done in engine.generate(requests)]

    alone, together = on_all_ranks(
        world, poisoned_store, EngineOptions(context=50, experts="whole", exchange=exchange), lead
    )
    assert alone == together
    if together is not None:
        reasons = [reason for _, reason, _ in together]
        assert 0 < reasons.count("error") < len(reasons)


def test_statistics_add_up(world: World, store: Store) -> None:
    def lead(engine: Runtime) -> Any:
        engine.generate([Request(random_ids(9, 300), 6)])
        return engine.statistics()

    _, statistics = on_all_ranks(world, store, EngineOptions(context=200), lead)
    if statistics is not None:
        assert (statistics.prefill_tokens, statistics.decode_tokens) == (9, 5)
        assert min(statistics.compute_s, statistics.exchange_s, statistics.waiting_s) >= 0
        assert statistics.sent_bytes > 0 or world.size == 1


def test_a_refused_prompt_leaves_the_ranks_usable(world: World, store: Store) -> None:
    def lead(engine: Runtime) -> list[int]:
        with pytest.raises(UsageError):
            engine.generate([Request((), 3)])
        return engine.generate([Request((1, 2), 3)])[0].ids

    alone, together = on_all_ranks(world, store, EngineOptions(context=200), lead)
    assert alone == together
