"""Engine.complete_several in plain python, and sampling options that are refused: the bundled demo model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from dist_moe import Engine, Result, SamplingOptions
from dist_moe.errors import UsageError

ONCE = "Once upon a time"
HOT = {"max_tokens": 12, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIST_MOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        with Engine(threads=1) as opened:
            yield opened


def test_samples_are_ranked_and_the_first_is_that_of_complete(engine: Engine) -> None:
    results = engine.complete_several(ONCE, samples=4, logprobs=2, **HOT)
    assert sorted(result.sample for result in results) == [0, 1, 2, 3]
    assert [result.score for result in results] == sorted((result.logprob for result in results), reverse=True)
    [first] = [result for result in results if result.sample == 0]
    assert (first.ids, first.text) == (engine.complete(ONCE, **HOT).ids, engine.complete(ONCE, **HOT).text)
    for result in results:
        assert [token.id for token in result.logprobs] == list(result.ids)
        assert all(len(token.best) == 2 and token.logprob <= 0 for token in result.logprobs)
        assert Result.of_dict(asdict(result)) == result


def test_beams_surpass_greedy(engine: Engine) -> None:
    [greedy] = engine.complete_several(ONCE, max_tokens=12, temperature=0)
    results = engine.complete_several(ONCE, beams=4, max_tokens=12)
    assert len({result.ids for result in results}) == 4
    assert results[0].logprob >= greedy.logprob
    assert [result.sample for result in results] == [None] * 4


def test_a_text_ends_without_its_stop_token(engine: Engine) -> None:
    results = engine.complete_several(ONCE, samples=3, max_tokens=400, temperature=1)
    assert {result.finish_reason for result in results} == {"stop"}
    for result in results:
        assert result.text == engine.detokenize(result.ids[:-1])
        assert "<|" not in result.text


def test_interrupts_end_all(engine: Engine) -> None:
    told = iter([False] * 5 + [True] * 99)
    results = engine.complete_several(ONCE, samples=3, interrupted=lambda: next(told), **HOT)
    assert {result.finish_reason for result in results} == {"interrupted"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, "samples: expected a whole number from 1 to 1024, found 0"),
        ({"beams": 0}, "beams: expected a whole number from 1 to 128, found 0"),
        ({"samples": 2, "beams": 2}, "samples and beams exclude each other"),
        ({"length_penalty": math.nan}, "length_penalty: expected a number from 0 to 10, found nan"),
        ({"logprobs": 257}, "logprobs: expected a whole number from 0 to 256, found 257"),
        ({"stop": "x"}, "stop: it is about a single text"),
    ],
)
def test_bad_searches_are_refused(engine: Engine, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        engine.complete_several(ONCE, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature: expected a number from 0 to 100, found -1"),
        ({"typical_p": 2}, "typical_p: expected a number from 0 to 1, found 2"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number from 0.01 to 100, found 0"),
        ({"presence_penalty": math.nan}, "presence_penalty: expected a number from -100 to 100, found nan"),
        ({"repeat_last_n": -2}, "repeat_last_n: expected a whole number from -1 to 2147483647, found -2"),
        ({"dry_base": 0.5}, "dry_base: expected a number from 1 to 10, found 0.5"),
        ({"dry_breakers": frozenset({()})}, "dry_breakers: expected sequences of token ids, found an empty one"),
        ({"logit_bias": tuple((token, -math.inf) for token in range(1024))}, "logit_bias bans every token"),
        ({"logit_bias": {5: 1.0}}, r"logit_bias: expected pairs \(token, bias\), found 5"),
        ({"logit_bias": ((99999, 1.0),)}, "logit_bias: a token: expected a whole number from 0 to"),
        (
            {"logit_bias": ((5, math.inf),)},
            r"logit_bias of token 5: expected a number from -1e\+06",
        ),
    ],
)
def test_bad_sampling_options_are_refused(engine: Engine, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        engine.complete(ONCE, sampling=SamplingOptions(**options))
    with pytest.raises(UsageError, match=words):
        next(iter(engine.generate(ONCE, sampling=SamplingOptions(**options))))


def test_penalties_reach_the_text(engine: Engine) -> None:
    plain = engine.complete(ONCE, max_tokens=16, temperature=0).ids
    for sampling in (
        SamplingOptions(repetition_penalty=3.0),
        SamplingOptions(logit_bias=((plain[1], -math.inf),)),
        SamplingOptions(frequency_penalty=20.0),
    ):
        assert engine.complete(ONCE, max_tokens=16, sampling=sampling).ids != plain
