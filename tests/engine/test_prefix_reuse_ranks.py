"""Reuse of resident sequences on the ranks that mpirun started, against one rank that computes everything anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.engine.requests.request import Request, SamplingOptions
from dist_moe.engine.runtime import EngineOptions, Runtime
from dist_moe.kernels import KvFormat, WeightFormat
from dist_moe.parallel.world import World
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from dist_moe.store.prompt_file import PromptFile
from dist_moe.store.reader import Store
from helpers.tiny_model import TinyModel, random_ids

pytestmark = pytest.mark.mpi

TEXT = random_ids(150, 300, seed=1)
PROMPTS = ((TEXT,), ((*TEXT[:100], 3, 4), (*TEXT[:100], 5), TEXT), ((*TEXT[:64], 9), (*TEXT[:129], 9)))
REUSED = [[0], [100, 100, 149], [64, 129]]


@pytest.fixture
def store(world: World, tmp_path: Path) -> Store:
    """One store for all ranks, made by the leader."""
    directory = Path(world.gather_texts(str(tmp_path))[0]) / "store"
    if world.is_leader:
        source = Checkpoint.open(TinyModel().write(tmp_path / "tiny"))
        convert(source, directory, StoreOptions(format=WeightFormat.Q8, nodes=2), lambda *told: None)
    world.barrier()
    return Store.open(directory)


def calls(engine: Runtime) -> tuple[list[Any], list[list[int]]]:
    """Three calls one after the other: ids and logits of everything, and how many tokens each prompt reused."""
    found: list[Any] = []
    reused = []
    for prompts in PROMPTS:
        rows: list[list[bytes]] = [[] for _ in prompts]
        requests = [
            Request(ids, 6, SamplingOptions(0.9, seed=i), on_logits=lambda row_V, to=own: to.append(row_V.tobytes()))
            for i, (ids, own) in enumerate(zip(prompts, rows, strict=True))
        ]
        completions = engine.generate(requests)
        found += [rows, [completion.ids for completion in completions]]
        reused.append([completion.reused_tokens for completion in completions])
    return found, reused


@pytest.mark.parametrize("kv", KvFormat)
def test_what_ranks_reuse_has_the_bits_of_a_fresh_prefill(world: World, store: Store, kv: KvFormat) -> None:
    options = EngineOptions(context=400, kv=kv, prefill_chunk=40)
    engine = Runtime(store, world, options)
    if not world.is_leader:
        engine.serve()
        return
    found, reused = calls(engine)
    engine.stop()
    fresh = Runtime(store, World(), EngineOptions(context=400, kv=kv, resident=0))
    expected, none = calls(fresh)
    assert reused == REUSED
    assert none == [[0], [0, 100, 100], [0, 64]]
    assert found == expected


@pytest.mark.parametrize("kv", KvFormat)
def test_a_saved_prompt_does_not_depend_on_the_rank_count(
    world: World, store: Store, kv: KvFormat, tmp_path: Path
) -> None:
    """All ranks write the bytes that one rank writes, and continue from them as it does."""
    options = EngineOptions(context=400, kv=kv)
    engine = Runtime(store, world, options)
    if not world.is_leader:
        engine.serve()
        return
    alone = Runtime(store, World(), options)
    for name, runtime in (("together", engine), ("alone", alone)):
        runtime.generate([Request(TEXT, 2)])
        assert runtime.prompt_cache.save(tmp_path / name, TEXT) == len(TEXT)
    assert (tmp_path / "together").read_bytes() == (tmp_path / "alone").read_bytes()
    prompt = (*TEXT[:140], 4)
    expected = alone.generate([Request(prompt, 9)])[0].ids
    engine.generate([Request(random_ids(390, 300, seed=2), 1)])  # evicts the text
    assert engine.generate([Request(prompt, 1)])[0].reused_tokens == 0
    engine.generate([Request(random_ids(390, 300, seed=3), 1)])
    assert engine.prompt_cache.restore(PromptFile(tmp_path / "alone")) == len(TEXT)
    [completion] = engine.generate([Request(prompt, 9)])
    assert (completion.reused_tokens, completion.ids) == (140, expected)
    engine.stop()
