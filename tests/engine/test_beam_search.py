"""Beam search against all texts that there are, and against itself in other cuts; n-best ranks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_moe.engine.requests.beams import BeamOptions, Beams
from dist_moe.engine.requests.request import Completion, Request, SamplingOptions, TokenLogprob
from dist_moe.engine.requests.scores import ranking, score
from dist_moe.engine.runtime import Runtime
from dist_moe.errors import UsageError
from helpers.tiny_model import random_ids

VALID = 4  # tokens that may be drawn: 4^3 texts of three
PROMPT = random_ids(62, 300)  # the texts cross the border of a 64-position block


@pytest.fixture
def engine(make_store, tiny_directory: Path, make_engine) -> Runtime:
    return make_engine(make_store(tiny_directory, "q8"), prefill_chunk=17)


def logprobs_after(engine: Runtime, text: tuple[int, ...]) -> np.ndarray:
    """Log p of the next token, float64 [VALID]."""
    rows: list[np.ndarray] = []
    engine.logits(text, lambda rows_NV: rows.extend(rows_NV.copy()))
    logits = rows[-1][:VALID].astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def all_texts(engine: Runtime, length: int, stop_ids: frozenset[int]) -> dict[tuple[int, ...], float]:
    """The log-probability of every text that ends with a stop token or is of the full length."""
    texts: dict[tuple[int, ...], float] = {}
    open_texts = {(): 0.0}
    for place in range(length):
        grown = {}
        for text, logprob in open_texts.items():
            for token, p in enumerate(logprobs_after(engine, (*PROMPT, *text))):
                longer = (*text, token)
                ends = token in stop_ids or place == length - 1
                (texts if ends else grown)[longer] = logprob + p
        open_texts = grown
    return texts


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 0.6])
@pytest.mark.parametrize("stop_ids", [frozenset(), frozenset({2})], ids=["free", "stops"])
def test_a_wide_search_finds_the_best_of_all_texts(engine: Runtime, stop_ids, length_penalty: float) -> None:
    request = Request(PROMPT, 3, stop_ids=stop_ids)
    found = engine.beam_search(request, BeamOptions(4**3, length_penalty), VALID)
    texts = all_texts(engine, 3, stop_ids)
    scores = {text: logprob / len(text) ** length_penalty for text, logprob in texts.items()}
    assert len(found) == len(texts) == (64 if not stop_ids else 1 + 3 + 9 * 4)
    assert {tuple(text.ids) for text in found} == set(texts)
    for text in found:
        assert text.cumulated_logprob == pytest.approx(texts[tuple(text.ids)], abs=1e-5)
        assert text.finish_reason == ("stop" if text.ids[-1] in stop_ids else "length")
    ranked = [scores[tuple(text.ids)] for text in found]
    assert all(before >= after - 1e-5 for before, after in itertools.pairwise(ranked))


@pytest.mark.parametrize("beams", [1, 2, 5, 20])
def test_the_search_is_the_definition_step_by_step(engine: Runtime, beams: int) -> None:
    """The same bookkeeping, fed by logits of whole texts instead of forked caches."""
    request, vocabulary = Request(PROMPT, 9, stop_ids=frozenset({7, 11}), logprobs=3), 60
    found = engine.beam_search(request, BeamOptions(beams, 1.0), vocabulary)
    search = Beams(BeamOptions(beams, 1.0), 9, request.stop_ids)
    while search.live:
        prompts = [(*PROMPT, *(token.id for token in text.tokens)) for text in search.live]
        greedy = [Request(prompt, 1, logprobs=beams + 2) for prompt in prompts]
        best = [
            [TokenLogprob(*pair, completion.logprobs[0].best[:3]) for pair in completion.logprobs[0].best]
            for completion in engine.generate(greedy, valid_vocabulary=vocabulary)
        ]
        search.advance(best, "length")
    assert found == search.completions()
    assert len(found) == beams
    assert {text.finish_reason for text in found} <= {"stop", "length"}


def test_one_beam_is_greedy(engine: Runtime) -> None:
    request = Request(PROMPT, 12, logprobs=0)
    assert engine.beam_search(request, BeamOptions(1)) == engine.generate([request])


def test_beams_leave_no_cache_and_reuse_prompts(make_store, tiny_directory: Path, make_engine) -> None:
    store, request = make_store(tiny_directory, "q8"), Request(PROMPT, 9)
    plain = make_engine(store).beam_search(request, BeamOptions(6))
    engine = make_engine(store, resident=512)
    engine.generate([Request(PROMPT, 3)])
    prefilled = engine.statistics().prefill_tokens
    held = engine.model.cache.allocated_bytes
    assert engine.beam_search(request, BeamOptions(6)) == plain
    assert engine.statistics().prefill_tokens == prefilled + 1
    engine.generate([Request((5, 6), 1)])
    assert engine.model.cache.allocated_bytes <= held + 2 * engine.model.cache.layer_bytes * 2


def test_limits_and_interrupts(engine: Runtime, make_store, tiny_directory: Path, make_engine) -> None:
    short = make_engine(make_store(tiny_directory, "q8"), context=65)
    assert {text.finish_reason for text in short.beam_search(Request(PROMPT, 9), BeamOptions(3))} == {"context"}
    told = iter([False, False, True])
    found = engine.beam_search(Request(PROMPT, 9), BeamOptions(3), interrupted=lambda: next(told))
    assert [(len(text.ids), text.finish_reason) for text in found] == [(3, "interrupted")] * 3
    with pytest.raises(UsageError, match="the prompt has no tokens"):
        engine.beam_search(Request((), 9), BeamOptions(3))
    with pytest.raises(UsageError, match="250 beams and 10 tokens that end a text are more than the 256"):
        engine.beam_search(Request(PROMPT, 9, stop_ids=frozenset(range(10))), BeamOptions(250))


def test_ties_go_to_the_first_text_and_the_lower_id() -> None:
    search = Beams(BeamOptions(3), 2, frozenset())
    search.advance([[TokenLogprob(4, -1.0), TokenLogprob(9, -1.0), TokenLogprob(2, -2.0)]], "length")
    assert [text.tokens[0].id for text in search.live] == [4, 9, 2]
    equal = [TokenLogprob(8, -1.0), TokenLogprob(3, -1.0)]
    search.advance([equal, equal, equal], "length")
    assert [text.ids for text in search.completions()] == [[4, 3], [4, 8], [9, 3]]


def test_a_search_ends_when_nothing_can_surpass_what_is_finished() -> None:
    for length_penalty, goes_on in ((0.0, False), (1.0, True)):
        search = Beams(BeamOptions(1, length_penalty), 10, frozenset({0}))
        search.advance([[TokenLogprob(0, -1.0), TokenLogprob(5, -2.0)]], "length")
        assert bool(search.live) == goes_on  # -2 / 10 could still beat -1 / 1
        if goes_on:
            search.advance([[TokenLogprob(5, -9.0), TokenLogprob(0, -9.5)]], "length")
            assert not search.live
        assert [text.ids for text in search.completions()] == [[0]]


def test_samples_are_ranked_by_their_score(engine: Runtime) -> None:
    sampling = SamplingOptions(temperature=1.5, seed=3)
    stops = frozenset(range(0, 300, 9))
    requests = [Request(PROMPT, 12, sampling, stops, sample=i, logprobs=0) for i in range(8)]
    completions = engine.generate(requests)
    assert len({tuple(found.ids) for found in completions}) == 8
    alone = [engine.generate([request])[0] for request in requests]
    assert [found.ids for found in alone] == [found.ids for found in completions]
    for length_penalty in (0.0, 1.0):
        order = ranking(completions, length_penalty)
        scores = [
            sum(token.logprob for token in found.logprobs) / len(found.ids) ** length_penalty for found in completions
        ]
        assert order == sorted(range(8), key=lambda i: -scores[i])
    whole = [sum(logprob_of(engine, PROMPT, found)) for found in completions]
    assert [found.cumulated_logprob for found in completions] == pytest.approx(whole, abs=1e-4)
    broken = replace(completions[order[0]], error="a NaN", finish_reason="error")
    assert ranking([broken, *completions[1:3]], 1.0)[-1] == 0


def logprob_of(engine: Runtime, prompt: tuple[int, ...], found: Completion) -> list[float]:
    rows: list[np.ndarray] = []
    engine.logits([*prompt, *found.ids], lambda rows_NV: rows.extend(rows_NV.astype(np.float64)))
    rows = rows[len(prompt) - 1 : -1]
    return [row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
            for row, token in zip(rows, found.ids, strict=True)]  # fmt: skip


def test_scores() -> None:
    assert score(-6.0, 4, 0.0) == -6.0
    assert score(-6.0, 4, 1.0) == pytest.approx(-1.5)
    assert score(-6.0, 4, 0.5) == pytest.approx(-3.0)
    assert score(0.0, 0, 1.0) == 0.0


def test_only_texts_among_the_best_are_finished() -> None:
    search = Beams(BeamOptions(1), 2, frozenset({0}))
    search.advance([[TokenLogprob(5, -1.0), TokenLogprob(0, -1.5)]], "length")
    search.advance([[TokenLogprob(6, -1.0), TokenLogprob(0, -1.2)]], "length")
    assert [text.ids for text in search.completions()] == [[5, 6]]
