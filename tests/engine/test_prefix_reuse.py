"""A prompt that begins like a finished sequence: what is reused has the bits of what is computed anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from dist_moe.engine.requests.request import Completion, Request, SamplingOptions
from dist_moe.engine.runtime import Runtime
from dist_moe.kernels import KvFormat
from dist_moe.model.step import Step
from helpers.tiny_model import random_ids

TEXT = random_ids(200, 300, seed=1)
OTHER = random_ids(200, 300, seed=2)
MakeRuntime = Callable[..., Runtime]


@pytest.fixture
def store(make_store, tiny_directory: Path):
    return make_store(tiny_directory, "q8")


def run(engine: Runtime, prompts: Sequence[Sequence[int]], tokens: int = 5) -> tuple[list[Completion], list[bytes]]:
    """Sampled completions, and the bits of all logits of each."""
    rows: list[list[np.ndarray]] = [[] for _ in prompts]

    def request(index: int) -> Request:
        sampling = SamplingOptions(temperature=0.8, seed=4)
        take = lambda logits_V: rows[index].append(logits_V.copy())  # noqa: E731
        return Request(tuple(prompts[index]), tokens, sampling, on_logits=take)

    completions = engine.generate([request(index) for index in range(len(prompts))])
    return completions, [np.array(each).tobytes() for each in rows]


def assert_same(found: tuple[list[Completion], list[bytes]], expected: tuple[list[Completion], list[bytes]]) -> None:
    assert [completion.ids for completion in found[0]] == [completion.ids for completion in expected[0]]
    assert found[1] == expected[1]


@pytest.mark.parametrize("kv", KvFormat)
@pytest.mark.parametrize("shared", [1, 2, 63, 64, 65, 127, 128, 129, 198, 199])
def test_a_cut_at_any_token_gives_the_bits_of_a_fresh_prefill(make_engine: MakeRuntime, store, kv, shared: int) -> None:
    prompt = TEXT[:shared] + OTHER[shared : shared + 70]
    assert TEXT[shared] != OTHER[shared]
    engine = make_engine(store, kv=kv, prefill_chunk=48)
    run(engine, [TEXT])
    [completion], _ = found = run(engine, [prompt])
    assert completion.reused_tokens == shared
    assert_same(found, run(make_engine(store, kv=kv), [prompt]))


def test_nothing_in_common_reuses_nothing(make_engine: MakeRuntime, store) -> None:
    engine = make_engine(store)
    run(engine, [TEXT])
    [completion], _ = found = run(engine, [OTHER])
    assert completion.reused_tokens == 0
    assert_same(found, run(make_engine(store), [OTHER]))


def test_the_same_prompt_computes_its_last_token(make_engine: MakeRuntime, store) -> None:
    engine = make_engine(store)
    expected = run(engine, [TEXT])
    [completion], _ = found = run(engine, [TEXT])
    assert completion.reused_tokens == len(TEXT) - 1
    assert_same(found, expected)
    assert_same(run(engine, [TEXT]), expected)


def test_a_second_turn_of_a_long_conversation_prefills_only_what_is_new(make_engine: MakeRuntime, store) -> None:
    """Also after old thinking was dropped from the middle: the cut is where the texts part."""
    conversation = random_ids(2000, 300, seed=5)
    engine = make_engine(store, context=4096)
    [first], _ = run(engine, [conversation], 30)
    whole = (*conversation, *first.ids, *random_ids(25, 300, seed=6))
    dropped = (*conversation, *first.ids[20:], *random_ids(25, 300, seed=7))
    for prompt, reused in ((whole, 2029), (dropped, 2000)):
        before = engine.statistics()
        [second], _ = found = run(engine, [prompt])
        after = engine.statistics()
        assert second.reused_tokens == after.reused_tokens - before.reused_tokens == reused
        assert after.prefill_tokens - before.prefill_tokens == len(prompt) - reused
        assert_same(found, run(make_engine(store, context=4096, resident=0), [prompt]))


@pytest.mark.parametrize("kv", KvFormat)
def test_requests_of_one_call_compute_their_common_beginning_once(make_engine: MakeRuntime, store, kv) -> None:
    prompts = [(*TEXT[:cut], 7, *OTHER[:index]) for index, cut in enumerate((150, 150, 128, 100, 63, 199, 10))]
    engine = make_engine(store, kv=kv, prefill_chunk=32)
    completions, _ = found = run(engine, prompts)
    assert [completion.reused_tokens for completion in completions] == [0, 151, 128, 100, 0, 150, 0]
    assert_same(found, run(make_engine(store, kv=kv, resident=0), prompts))
    for prompt, completion, bits in zip(prompts, *found, strict=True):
        assert_same(([completion], [bits]), run(make_engine(store, kv=kv), [prompt]))


def test_forks_do_not_disturb_each_other(make_engine: MakeRuntime, store) -> None:
    """Several sequences grow from the same partial block at once, twice."""
    engine = make_engine(store)
    run(engine, [TEXT[:100]], 1)
    prompts = [(*TEXT[:90], index) for index in range(5)]
    expected = run(make_engine(store, resident=0), prompts, 60)
    for _ in range(2):
        found = run(engine, prompts, 60)
        assert all(completion.reused_tokens >= 90 for completion in found[0])
        assert_same(found, expected)


@pytest.mark.parametrize("resident", [0, 64, 600, None])
def test_memory_stays_within_the_budget(make_engine: MakeRuntime, store, resident: int | None) -> None:
    """Many texts one after the other, at most one context of 256 at once."""
    engine = make_engine(store, context=256, resident=resident)
    for index in range(12):
        prompt = (*TEXT[: 17 * index], *random_ids(40, 300, seed=index))
        run(engine, [prompt], 9)
        blocks = engine.model.cache.allocated_bytes // block_bytes(engine)
        assert blocks <= -(-max(256, resident or 0) // 64)
    assert (engine.statistics().reused_tokens > 0) == (resident != 0)


def test_a_text_whose_logits_are_wanted_makes_room_first(make_engine: MakeRuntime, store) -> None:
    engine = make_engine(store, context=256)
    run(engine, [TEXT])
    engine.logits(OTHER, lambda rows: None)
    assert engine.model.cache.allocated_bytes <= 256 // 64 * block_bytes(engine)


def block_bytes(engine: Runtime) -> int:
    return engine.config.layers * engine.model.cache.layer_bytes


def test_an_interrupted_request_leaves_what_it_computed(make_engine: MakeRuntime, store) -> None:
    engine = make_engine(store, prefill_chunk=32)
    steps: list[int] = []
    [broken] = engine.generate([Request(TEXT, 5)], interrupted=lambda: steps.append(1) or len(steps) == 3)
    assert (broken.finish_reason, broken.ids) == ("interrupted", [])
    [completion], _ = found = run(engine, [TEXT])
    assert completion.reused_tokens == 96
    assert_same(found, run(make_engine(store), [TEXT]))


def test_a_callback_that_fails_leaves_what_was_computed(make_engine: MakeRuntime, store) -> None:
    engine = make_engine(store)
    with pytest.raises(ZeroDivisionError):
        engine.generate([Request(TEXT, 9), Request(OTHER, 9)], lambda index, token: 1 // 0)
    completions, _ = found = run(engine, [TEXT, OTHER])
    assert completions[0].reused_tokens == len(TEXT) - 1
    assert_same(found, run(make_engine(store), [TEXT, OTHER]))


def test_a_poisoned_sequence_is_never_reused(make_engine: MakeRuntime, store, monkeypatch) -> None:
    """A fault in one step spoils the K and V of its sequence: the same prompt computes them anew."""
    engine = make_engine(store, prefill_chunk=64)
    run_layers = engine.model.run_layers

    def poisoned(step: Step) -> None:
        run_layers(step)
        if any(part.position == 64 for part in step.slices):
            engine.model.fault_T[:] = 1 << 8 | 1

    monkeypatch.setattr(engine.model, "run_layers", poisoned)
    [failed], _ = run(engine, [TEXT])
    assert failed.finish_reason == "error"
    monkeypatch.setattr(engine.model, "run_layers", run_layers)
    [completion], _ = found = run(engine, [TEXT])
    assert completion.reused_tokens == 0
    assert_same(found, run(make_engine(store), [TEXT]))


def test_a_text_whose_logits_were_wanted_is_not_reused(make_engine: MakeRuntime, store) -> None:
    """Nobody knows whether it will be, and it may be a whole book."""
    engine = make_engine(store)
    engine.logits(TEXT, lambda rows: None)
    [completion], _ = run(engine, [TEXT])
    assert completion.reused_tokens == 0
