"""generate() and logits() on one rank: batches, sampling, limits, faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dist_moe.engine.requests.request import Completion, Request, SamplingOptions
from dist_moe.errors import DistMoeError, UsageError
from dist_moe.kernels import KvFormat
from helpers.tiny_model import random_ids

VOCABULARY = 300


def with_logits(request: Request) -> tuple[Request, list[np.ndarray]]:
    """The request, and a list that gets its rows of logits."""
    rows: list[np.ndarray] = []
    return replace(request, on_logits=lambda logits_V: rows.append(logits_V.copy())), rows


def run(engine, requests: list[Request]) -> tuple[list[Completion], list[np.ndarray]]:
    """Completions, and each one's logits [generated, V]."""
    pairs = [with_logits(request) for request in requests]
    completions = engine.generate([request for request, _ in pairs])
    return completions, [np.array(rows) for _, rows in pairs]


def prompts(count: int) -> list[tuple[int, ...]]:
    return [random_ids(3 + 17 * i % 71, VOCABULARY, seed=i) for i in range(count)]


@pytest.fixture(params=["f32", "bf16", "q8", "q4"])
def store(request: pytest.FixtureRequest, make_store, tiny_directory: Path):
    return make_store(tiny_directory, request.param)


def test_a_batch_gives_what_each_request_gives_alone(store, make_engine) -> None:
    requests = [
        Request(ids, 9, SamplingOptions(temperature=0.8, top_p=0.9, seed=i)) for i, ids in enumerate(prompts(5))
    ]
    together, rows_together = run(make_engine(store, prefill_chunk=11), requests)
    for request, completion, rows in zip(requests, together, rows_together, strict=True):
        [alone], [rows_alone] = run(make_engine(store), [request])
        assert alone.ids == completion.ids
        assert np.array_equal(rows_alone, rows)


def test_generated_logits_are_those_of_the_whole_text(store, make_engine) -> None:
    engine = make_engine(store, kv=KvFormat.Q8)
    [completion], [generated] = run(engine, [Request(prompts(1)[0], 70)])
    rows: list[np.ndarray] = []
    engine.logits([*prompts(1)[0], *completion.ids], lambda rows_NV: rows.extend(rows_NV.copy()))
    assert np.array_equal(np.stack(rows)[2:-1], generated)
    assert completion.ids == generated.argmax(axis=1).tolist()


def test_candidates_decide_as_the_whole_row_does(make_store, tiny_directory: Path, make_engine, monkeypatch) -> None:
    requests = [
        Request(ids, 12, SamplingOptions(temperature=temperature, top_p=top_p, min_p=min_p, seed=3))
        for ids, temperature, top_p, min_p in zip(
            prompts(4), (1.0, 5.0, 30.0, 0.1), (1.0, 0.95, 1.0, 1.0), (0.0, 0.0, 0.0, 0.2), strict=True
        )
    ]
    store = make_store(tiny_directory, "q8")
    expected = [completion.ids for completion in make_engine(store).generate(requests)]
    monkeypatch.setattr("dist_moe.engine.requests.candidates.CANDIDATES", 5)
    engine = make_engine(store)
    fetched: list[int] = []
    fetch_row = engine._crew.fetch_row
    monkeypatch.setattr(engine._crew, "fetch_row", lambda row: fetched.append(row) or fetch_row(row))
    assert [completion.ids for completion in engine.generate(requests)] == expected
    assert fetched, "5 candidates cannot always decide"


def test_masked_ids_are_never_drawn(make_store, tiny_directory: Path, make_engine) -> None:
    engine = make_engine(make_store(tiny_directory, "q8"))
    request = Request(prompts(1)[0], 60, SamplingOptions(temperature=50.0))
    [completion] = engine.generate([request], valid_vocabulary=130)
    assert max(completion.ids) < 130
    assert len(set(completion.ids)) > 20


def test_stop_ids_end_a_sequence_and_the_context_does(make_store, tiny_directory: Path, make_engine) -> None:
    engine = make_engine(make_store(tiny_directory, "q8"), context=40)
    ids = prompts(1)[0]
    [free] = engine.generate([Request(ids, 100)])
    assert (len(free.ids), free.finish_reason) == (40 - len(ids), "context")
    stop = free.ids[5]
    [stopped] = engine.generate([Request(ids, 100, stop_ids=frozenset([stop]))])
    assert (stopped.ids, stopped.finish_reason) == (free.ids[: free.ids.index(stop) + 1], "stop")


def test_tokens_are_told_as_they_are_drawn(make_store, tiny_directory: Path, make_engine) -> None:
    told: list[tuple[int, int]] = []
    requests = [Request(ids, 4) for ids in prompts(3)]
    completions = make_engine(make_store(tiny_directory, "q8")).generate(requests, lambda i, t: told.append((i, t)))
    for index, completion in enumerate(completions):
        assert [token for i, token in told if i == index] == completion.ids


@pytest.mark.parametrize(
    ("ids", "words"),
    [((), "no tokens"), ((1, 300), "300.*0 to 299"), ((-1,), "-1"), ((5,) * 41, "41 tokens.*context 40.*--ctx")],
)
def test_bad_prompts_are_refused(ids, words: str, make_store, tiny_directory: Path, make_engine) -> None:
    engine = make_engine(make_store(tiny_directory, "q8"), context=40)
    with pytest.raises(UsageError, match=words):
        engine.generate([Request(ids, 4)])
    with pytest.raises(UsageError, match=words):
        engine.logits(ids, lambda rows: None)


def test_caches_of_finished_sequences_are_freed(make_store, tiny_directory: Path, make_engine) -> None:
    engine = make_engine(make_store(tiny_directory, "q8"), resident=0)
    engine.generate([Request(ids, 4) for ids in prompts(3)])
    held, mapped = engine.model.cache.allocated_bytes, engine.model.cache.mapped_bytes
    for _ in range(3):
        engine.generate([Request(ids, 4) for ids in prompts(3)])
    assert engine.model.cache.allocated_bytes <= held
    assert engine.model.cache.mapped_bytes == mapped


@pytest.fixture(scope="session")
def poisoned_directory(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a NaN in the expert that the fewest of its tokens reach."""
    directory = tmp_path_factory.mktemp("poisoned")
    tensors = load_file(tiny_directory / "model.safetensors")
    tensors["model.layers.0.mlp.experts.0.up_proj.weight"][5, 7] = np.nan
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text((tiny_directory / "config.json").read_text())
    return directory


def test_a_poisoned_sequence_ends_alone(
    make_store, make_engine, tiny_directory: Path, poisoned_directory: Path
) -> None:
    clean = make_engine(make_store(tiny_directory))
    poisoned = make_engine(make_store(poisoned_directory, allow_nonfinite=True))
    requests = [Request((token, token + 1), 3) for token in range(0, 60, 4)]
    expected, expected_rows = run(clean, requests)
    found, found_rows = run(poisoned, requests)
    ended = [completion for completion in found if completion.finish_reason == "error"]
    assert 0 < len(ended) < len(found)
    for completion, reference, rows, reference_rows in zip(found, expected, found_rows, expected_rows, strict=True):
        if completion.finish_reason == "error":
            assert completion.error is not None
            assert "layer 0" in completion.error
        else:
            assert completion.ids == reference.ids
            assert np.array_equal(rows, reference_rows)


def test_logits_of_a_poisoned_text_name_position_and_layer(make_store, make_engine, poisoned_directory: Path) -> None:
    engine = make_engine(make_store(poisoned_directory, allow_nonfinite=True))
    with pytest.raises(DistMoeError, match=r"position \d+: .* in layer 0"):
        engine.logits(list(range(60)), lambda rows: None)


def test_refused_and_broken_texts_leave_no_cache(make_store, make_engine, poisoned_directory: Path) -> None:
    engine = make_engine(make_store(poisoned_directory, allow_nonfinite=True), resident=0)
    held = []
    for _ in range(3):
        with pytest.raises(DistMoeError):
            engine.logits(list(range(60)), lambda rows: None)
        with pytest.raises(ZeroDivisionError):
            engine.generate([Request((4, 5), 9), Request((8, 9), 9)], lambda index, token: 1 // 0)
        held.append(engine.model.cache.allocated_bytes)
    assert held[0] == held[2]


def test_statistics_count_tokens_and_time(make_store, tiny_directory: Path, make_engine) -> None:
    engine = make_engine(make_store(tiny_directory, "q8"))
    engine.generate([Request(tuple(range(20)), 5)])
    statistics = engine.statistics()
    assert (statistics.prefill_tokens, statistics.decode_tokens, statistics.steps) == (20, 4, 5)
    assert statistics.prefill_s > 0
    assert statistics.decode_s > 0
    assert statistics.compute_s > 0
    assert (statistics.exchange_s, statistics.waiting_s, statistics.sent_bytes) == (0, 0, 0)


def test_copied_weights_give_the_same_tokens(make_store, make_engine, tiny_directory: Path) -> None:
    store = make_store(tiny_directory, "q4")
    requests = [Request(random_ids(20, 300), 12, stop_ids=frozenset())]
    mapped, copied = (make_engine(store, copy_weights=copies) for copies in (False, True))
    assert copied.generate(requests)[0].ids == mapped.generate(requests)[0].ids
    files = [range(file.address, file.address + file.file_bytes) for file in store._files.values()]
    for engine, is_mapped in ((mapped, True), (copied, False)):
        chunk = int(engine.model.weights.layers[0].experts.addresses[3])
        assert any(chunk in file for file in files) == is_mapped
