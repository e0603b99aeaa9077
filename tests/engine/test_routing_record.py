"""The recorded routing against a router in float64, and on any chunking and number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.engine.requests.request import Request
from dist_moe.engine.routing.routing_facts import routing_facts
from dist_moe.engine.routing.routing_record import RoutingBatch, RoutingRecorder, recorded_routing
from dist_moe.engine.runtime import EngineOptions, Runtime
from dist_moe.kernels import WeightFormat, reference
from dist_moe.parallel.world import World
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from helpers.tiny_model import TinyModel, random_ids

TINY = TinyModel(layers=3, dense_layers=(1,))
PROMPTS = [random_ids(count, TINY.vocabulary, seed=count) for count in (19, 4, 33)]


@dataclass
class Recorded:
    """Copies of what a sink was told."""

    batches: list[RoutingBatch] = field(default_factory=list)

    def take(self, batch: RoutingBatch) -> None:
        arrays = {name: value.copy() for name, value in vars(batch).items() if isinstance(value, np.ndarray)}
        self.batches.append(RoutingBatch(step=batch.step, **arrays))

    def rows(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(batch, name) for batch in self.batches])

    def by_position(self, sequence: int) -> list[bytes]:
        """Of one sequence, in the order of positions: id, experts and weights, as bytes."""
        rows = np.flatnonzero(self.rows("sequence_T") == sequence)
        rows = rows[np.argsort(self.rows("position_T")[rows], kind="stable")]
        names = ("ids_T", "position_T", "experts_TLK", "weights_TLK")
        return [self.rows(name)[rows].tobytes() for name in names]


def record(engine: Runtime, requests: list[Request]) -> Recorded:
    found = Recorded()
    with recorded_routing(engine.model, found.take):
        engine.generate(requests)
    assert engine.model.observer is None
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.write(tmp_path_factory.mktemp("routed"))


def test_experts_and_weights_are_those_of_a_router_in_float64(make_store, make_engine, directory: Path) -> None:
    engine = make_engine(make_store(directory, "f32"))
    found = Recorded()
    recorder = RoutingRecorder(engine.model, [found.take])
    residuals: dict[int, np.ndarray] = {}

    def observe(layer: int, half: str, x_TD: np.ndarray) -> None:
        if half == "attention":
            residuals[layer] = x_TD.copy()
        recorder.observe(layer, half, x_TD)

    engine.model.observer = observe
    engine.generate([Request(PROMPTS[2], 1)])
    (batch,) = found.batches
    tensors = load_file(directory / "model.safetensors")
    for layer in (0, 2):
        name = f"model.layers.{layer}."
        normed_TD = reference.rmsnorm(residuals[layer], tensors[name + "post_attention_layernorm.weight"], 1e-6)
        logits_TE = normed_TD @ tensors[name + "mlp.gate.weight"].astype(np.float64).T
        best_TE = np.sort(logits_TE, axis=1)[:, ::-1]
        assert np.diff(best_TE[:, : TINY.experts_per_token + 1], axis=1).max() < -1e-5, "ties would prove nothing"
        ids_TK, weights_TK = reference.route(logits_TE, TINY.experts_per_token, norm_topk_prob=True)
        assert np.array_equal(batch.experts_TLK[:, layer], ids_TK)
        assert np.abs(batch.weights_TLK[:, layer] - weights_TK).max() < 1e-5


def test_tokens_have_their_sequence_position_and_id(make_store, make_engine, directory: Path) -> None:
    engine = make_engine(make_store(directory, "q8"), prefill_chunk=7)
    found = record(engine, [Request(ids, 3) for ids in PROMPTS])
    assert [batch.step for batch in found.batches] == list(range(len(found.batches)))
    [again] = engine.generate([Request(PROMPTS[1], 3)])
    for sequence, ids in enumerate(PROMPTS):
        rows = found.rows("sequence_T") == sequence
        # The last token drawn is not computed.
        assert found.rows("position_T")[rows].tolist() == list(range(len(ids) + 2))
        assert tuple(found.rows("ids_T")[rows][: len(ids)]) == ids
    rows = found.rows("sequence_T") == 1
    assert found.rows("ids_T")[rows].tolist() == [*PROMPTS[1], *again.ids[:2]]


def test_dense_layers_are_marked(make_store, make_engine, directory: Path) -> None:
    found = record(make_engine(make_store(directory, "q8")), [Request(PROMPTS[0], 2)])
    experts_TLK, weights_TLK = found.rows("experts_TLK"), found.rows("weights_TLK")
    assert experts_TLK.dtype == np.int16
    assert (experts_TLK[:, 1] == -1).all()
    assert (weights_TLK[:, 1] == 0).all()
    assert experts_TLK[:, [0, 2]].min() >= 0
    assert np.allclose(weights_TLK[:, [0, 2]].sum(axis=2), 1, atol=1e-6)


def test_the_record_does_not_depend_on_chunks_or_company(make_store, make_engine, directory: Path) -> None:
    store = make_store(directory, "q8")
    together = record(make_engine(store, prefill_chunk=5), [Request(ids, 4) for ids in PROMPTS])
    for sequence, ids in enumerate(PROMPTS):
        alone = record(make_engine(store), [Request(ids, 4)])
        assert together.by_position(sequence) == alone.by_position(0)


def test_facts_are_those_of_model_and_job(make_store, make_engine, directory: Path) -> None:
    facts = routing_facts(make_engine(make_store(directory, "q8")).model, "tiny")
    assert (facts.model, facts.layers, facts.experts, facts.experts_per_token) == ("tiny", 3, 8, 3)
    assert (facts.routed_layers, facts.ranks) == ((0, 2), 1)
    assert facts.chunks_per_expert == 2  # 192 hidden units in chunks of 96


@pytest.mark.mpi
@pytest.mark.parametrize("layout", ["whole", "sliced", "shared"])
def test_the_record_is_that_of_one_rank(world: World, tmp_path: Path, layout: str) -> None:
    store_directory = Path(world.gather_texts(str(tmp_path))[0]) / "store"
    if world.is_leader:
        source = Checkpoint.open(TINY.write(tmp_path / "tiny"))
        convert(source, store_directory, StoreOptions(format=WeightFormat.Q8), lambda *told: None)
    world.barrier()
    store = Store.open(store_directory)
    options = EngineOptions(context=100, experts=layout, prefill_chunk=16)
    requests = [Request(ids, 5) for ids in PROMPTS]
    alone = record(Runtime(store, World(), options), requests) if world.is_leader else None
    engine = Runtime(store, world, options)
    if alone is None:
        engine.serve()
        return
    together = record(engine, requests)
    engine.stop()
    for sequence in range(len(PROMPTS)):
        assert together.by_position(sequence) == alone.by_position(sequence)
