"""The sampler of one request: candidates against the whole row, penalties against their definitions, log-probabilities.

V logits, C candidates.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dist_moe.engine.requests.candidates import Candidates, block_sums, row_candidates
from dist_moe.engine.requests.dry import Dry
from dist_moe.engine.requests.pieces import Result, Usage
from dist_moe.engine.requests.request import Completion, Request, SamplingOptions, TokenLogprob
from dist_moe.engine.requests.sampling import Sampler
from dist_moe.kernels import NO_FAULT, Kernels

V, VALID = 600, 580
FILTERS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top_k": {"top_k": 12},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "typical": {"top_k": 20, "typical_p": 0.6},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
}
PENALTIES = {
    "none": {},
    "repetition": {"repetition_penalty": 1.4},
    "window": {"repetition_penalty": 1.4, "repeat_last_n": 7},
    "reward": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    "negative": {"presence_penalty": -0.5},
    "dry": {"dry_multiplier": 0.8, "dry_allowed_length": 1},
    "bias": {"logit_bias": ((3, 4.0), (90, -math.inf), (200, -1.5))},
    "all": {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "dry_multiplier": 0.8,
        "logit_bias": ((3, -2.0), (90, -math.inf)),
    },
}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(1)


class Rows:
    """Random rows of logits; a Zipf-like text repeats its tokens."""

    def __init__(self, kernels: Kernels, seed: int) -> None:
        self.kernels, self.rng, self.fetched = kernels, np.random.default_rng(seed), 0

    def text(self, tokens: int) -> tuple[int, ...]:
        return tuple((self.rng.zipf(1.5, tokens) % 30).tolist())

    def logits(self, scale: float) -> np.ndarray:
        """Low ids are likely, as tokens of the text are."""
        logits_V = (self.rng.standard_normal(V) * scale).astype(np.float32)
        logits_V[:30] += np.float32(1.5 * scale)
        return np.round(logits_V * 8) / np.float32(8) if self.rng.random() < 0.5 else logits_V  # with many ties

    def candidates(self, logits_V: np.ndarray, temperature: float, count: int) -> Candidates:
        fault_N, row_NV = np.full(1, NO_FAULT, np.int32), logits_V[None]
        _, unit_sum_NB = block_sums(self.kernels, row_NV, (1.0,), VALID, fault_N, 0)
        found = row_candidates(self.kernels, logits_V, temperature, VALID, count)
        return replace(found, unit_sum_B=unit_sum_NB[0])

    def draw(self, request: Request, ids: list[int], logits_V: np.ndarray, count: int) -> Completion:
        """What follows `ids`, with so many candidates; 0: the sampler is led to the row."""
        completion = Completion(list(ids))
        found = self.candidates(logits_V, request.sampling.temperature, count or V)
        if count == 0:
            found = replace(found, ids_C=found.ids_C[:0], logits_C=found.logits_C[:0], complete=False)
        Sampler(request).draw(self.kernels, completion, found, lambda: self._fetch(logits_V), VALID)
        return completion

    def _fetch(self, logits_V: np.ndarray) -> np.ndarray:
        self.fetched += 1
        row_V = logits_V.copy()
        row_V.setflags(write=False)  # it belongs to the exchange
        return row_V


@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize("filters", FILTERS)
def test_candidates_and_the_row_give_the_same_token(kernels: Kernels, filters: str, penalties: str) -> None:
    rows = Rows(kernels, 1)
    options = SamplingOptions(**{"temperature": 0.9, "seed": 9, **FILTERS[filters], **PENALTIES[penalties]})
    by_candidates = 0
    for _ in range(40):
        request = Request(rows.text(40), 50, options)
        ids, logits_V = list(rows.text(int(rows.rng.integers(0, 30)))), rows.logits(rows.rng.choice([0.5, 2.0, 5.0]))
        expected = rows.draw(request, ids, logits_V, 0).ids
        for count in (4, 40, 256):
            before = rows.fetched
            assert rows.draw(request, ids, logits_V, count).ids == expected
            by_candidates += rows.fetched == before
    needs_mass = filters in ("plain", "top_p") and penalties != "none"
    never = needs_mass or penalties in ("reward", "negative")
    assert (by_candidates == 0) == never, f"{by_candidates} of 120 draws needed no row"


@pytest.mark.parametrize("penalties", PENALTIES)
def test_penalized_greedy_draws_are_those_of_the_definition(kernels: Kernels, penalties: str) -> None:
    rows = Rows(kernels, 2)
    options = SamplingOptions(**PENALTIES[penalties])
    for _ in range(60):
        request = Request(rows.text(30), 50, options)
        ids, logits_V = list(rows.text(20)), rows.logits(2.0)
        expected = defined_logits(options, list(request.prompt_ids), ids, logits_V)[:VALID]
        [*_, token] = rows.draw(request, ids, logits_V, 256).ids
        assert expected[token] >= expected.max() - 1e-5
        best = np.flatnonzero(expected == expected.max())
        assert token == best[0] or expected[token] != expected.max()


def defined_logits(o: SamplingOptions, prompt: list[int], generated: list[int], logits_V: np.ndarray) -> np.ndarray:
    """The changed logits in float64, token by token."""
    x, text = logits_V.astype(np.float64), prompt + generated
    for token, bias in o.logit_bias:
        x[token] += bias
    for token in set(text if o.repeat_last_n < 0 else text[len(text) - o.repeat_last_n :]):
        x[token] = x[token] / o.repetition_penalty if x[token] > 0 else x[token] * o.repetition_penalty
    for token in set(generated):
        x[token] -= o.presence_penalty + o.frequency_penalty * generated.count(token)
    if o.dry_multiplier:
        for token, length in defined_repetitions(o, text).items():
            x[token] -= o.dry_multiplier * o.dry_base ** (length - o.dry_allowed_length)
    return x


def defined_repetitions(o: SamplingOptions, text: list[int]) -> dict[int, int]:
    """DRY by brute force: for every earlier place, how much of the text's end stands before it."""
    text = text if o.dry_last_n < 0 else text[max(0, len(text) - o.dry_last_n) :]
    found: dict[int, int] = {}
    for place in range(1, len(text)):
        length = 0
        while length < place and text[place - 1 - length] == text[len(text) - 1 - length]:
            if any(ends_with(text[: len(text) - length], breaker) for breaker in o.dry_breakers):
                break
            length += 1
        if length >= o.dry_allowed_length:
            found[text[place]] = max(length, found.get(text[place], 0))
    return found


def ends_with(text: list[int], breaker: tuple[int, ...]) -> bool:
    return len(text) >= len(breaker) and tuple(text[-len(breaker) :]) == breaker


@pytest.mark.parametrize("last_n", [-1, 0, 1, 9, 30, 1000])
@pytest.mark.parametrize("breakers", [frozenset(), frozenset({(0,), (3, 1)})], ids=["free", "breakers"])
def test_dry_finds_the_repetitions_of_the_definition(breakers: frozenset[tuple[int, ...]], last_n: int) -> None:
    rng, lengths = np.random.default_rng(3), set()
    for trial in range(80):
        options = SamplingOptions(
            dry_multiplier=1, dry_allowed_length=1 + trial % 4, dry_last_n=last_n, dry_breakers=breakers
        )
        text = rng.integers(0, 2 + trial % 3, 50).tolist()
        text = text[:20] + text[: trial % 30] if trial % 2 else text
        dry = Dry(options)
        for first in range(0, len(text), 7):
            dry.extend(text[first : first + 7])
            found = dry.repetitions()
            assert found == defined_repetitions(options, text[: first + 7])
            lengths |= set(found.values())
    assert max(lengths, default=0) >= (0 if last_n in (0, 1) else 4)


def test_dry_grows_with_the_repetition_and_forgets_it(kernels: Kernels) -> None:
    dry = Dry(SamplingOptions(dry_multiplier=0.5, dry_base=2.0, dry_allowed_length=2))
    penalty_V = np.zeros(10, np.float32)
    dry.extend([1, 2, 3, 4, 9, 1, 2])
    for token, next_penalty in ((3, 0.5), (4, 1.0), (9, 2.0)):
        dry.note(kernels, penalty_V)
        assert {int(i): float(penalty_V[i]) for i in np.flatnonzero(penalty_V)} == {token: next_penalty}
        dry.extend([token])
    dry.extend([7])
    dry.note(kernels, penalty_V)
    assert not penalty_V.any()
    dry.extend([8] * 400)  # 0.5 * 2^397 is beyond float32
    dry.note(kernels, penalty_V)
    assert penalty_V[8] == np.float32(1e30)
    assert dry.repetitions()[8] < 110  # longer ones are penalized alike


def test_a_repetition_window_moves_with_the_text(kernels: Kernels) -> None:
    """One sampler that follows a text decides as fresh ones do."""
    rows = Rows(kernels, 4)
    for last_n in (-1, 0, 1, 5, 100):
        options = SamplingOptions(repetition_penalty=1.5, repeat_last_n=last_n, dry_multiplier=1.0)
        request, completion = Request(rows.text(8), 60, options), Completion()
        sampler = Sampler(request)
        for _ in range(60):
            logits_V = rows.logits(1.0)
            expected = rows.draw(request, completion.ids, logits_V, 256).ids
            sampler.draw(kernels, completion, rows.candidates(logits_V, 0, 256), lambda: logits_V, VALID)  # noqa: B023
            assert completion.ids == expected
            if len(completion.ids) % 10 == 0:
                completion.ids += [1, 2]  # tokens that someone else decided


def test_a_text_that_was_cut_is_penalized_as_a_whole(kernels: Kernels) -> None:
    rows, drawn = Rows(kernels, 8), set()
    options = SamplingOptions(temperature=1.0, presence_penalty=1.5, frequency_penalty=0.7)
    for _ in range(20):
        prompt, text, logits_V = rows.text(9), rows.text(9), rows.logits(0.3)
        whole = rows.draw(Request(prompt, 9, options), list(text), logits_V, 30).ids[-1]
        cut = Request((*prompt, *text), 9, options)
        assert rows.draw(replace(cut, continued=len(text)), [], logits_V, 30).ids == [whole]
        drawn.add(rows.draw(cut, [], logits_V, 30).ids == [whole])
    assert drawn == {True, False}


def test_logprobs_are_the_models_own(kernels: Kernels) -> None:
    rows = Rows(kernels, 5)
    for temperature, best in ((0.0, 0), (1.0, 5), (0.3, 20), (30.0, 3)):
        options = SamplingOptions(temperature=temperature, repetition_penalty=1.5, logit_bias=((7, 9.0),))
        request, logits_V = Request(rows.text(9), 9, options, logprobs=best), rows.logits(3.0)
        logits = logits_V[:VALID].astype(np.float64)
        expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        completion = rows.draw(request, [], logits_V, 30)
        [found], [token] = completion.logprobs, completion.ids
        assert found.id == token
        assert found.logprob == pytest.approx(expected[token], abs=1e-5)
        assert [token for token, _ in found.best] == np.argsort(-logits, kind="stable")[:best].tolist()
        assert [p for _, p in found.best] == pytest.approx([expected[token] for token, _ in found.best], abs=1e-5)
        assert completion.cumulated_logprob == found.logprob


def test_samples_draw_independent_numbers(kernels: Kernels) -> None:
    rows = Rows(kernels, 6)
    logits_V, counts = rows.logits(0.5), np.zeros(2)
    for position in range(200):
        request = Request((1,) * (position + 1), 9, SamplingOptions(temperature=1.0, top_k=2))
        best = rows.draw(request, [], logits_V, 2).ids
        other = rows.draw(replace(request, sample=1), [], logits_V, 2).ids
        counts[int(best == other)] += 1
    assert counts.min() > 60  # two tokens of about equal probability: 100 expected, 7 is a standard deviation


def test_a_token_that_sinks_to_the_last_candidate_is_not_certain(kernels: Kernels) -> None:
    """Token 9 sinks to 2.0, where 5 and 6, which are no candidates, stand before it."""
    rows, logits_V = Rows(kernels, 7), np.zeros(V, np.float32)
    logits_V[9], logits_V[2:7] = 3, 2
    drawn = set()
    for position in range(1, 60):
        options = SamplingOptions(temperature=1.0, top_k=4, logit_bias=((9, -1.0),))
        request = Request((1,) * position, 9, options)
        [token] = rows.draw(request, [], logits_V, 4).ids
        assert [token] == rows.draw(request, [], logits_V, 0).ids
        drawn.add(token)
    assert drawn == {2, 3, 4, 5}


def test_log_probabilities_are_added_one_by_one() -> None:
    """Since Python 3.12 sum() gives -1.0000000000000002."""
    tokens = [TokenLogprob(0, logprob) for logprob in (-1.0, -1e-16, -1e-16)]
    assert Completion(logprobs=tokens).cumulated_logprob == -1.0
    assert Result("", (0, 0, 0), "length", Usage(1, 3), logprobs=tuple(tokens)).logprob == -1.0
