"""The public Engine in plain python: one rank, the bundled demo model."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_moe import DistMoeError, Engine, Piece, Result, SamplingOptions
from dist_moe.demo import demo_model_directory
from dist_moe.errors import CheckpointError, StoreError, UsageError
from helpers import launching

PROMPTS = ["Once upon a time", "A dog", "One day, Tom", "The sun was"]
ONCE = PROMPTS[0]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIST_MOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        with Engine(threads=1) as opened:
            yield opened


def joined(pieces: list[Piece]) -> tuple[str, tuple[int, ...]]:
    return "".join(piece.text for piece in pieces), tuple(token for piece in pieces for token in piece.ids)


# ---- pieces and results ----


def test_pieces_make_the_result(engine: Engine) -> None:
    pieces = list(engine.generate(ONCE, max_tokens=12))
    result = engine.complete(ONCE, max_tokens=12)
    assert joined(pieces) == (result.text, result.ids)
    assert [piece.finish_reason for piece in pieces] == [None] * 11 + ["length"]
    assert engine.detokenize(result.ids) == engine.detokenize([-1, *result.ids, 2**70]) == result.text
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(engine.tokenize(ONCE)), 12)


def test_ids_and_text_are_the_same_prompt(engine: Engine) -> None:
    ids = engine.tokenize(ONCE)
    assert engine.complete(np.array(ids), max_tokens=8).ids == engine.complete(ONCE, max_tokens=8).ids


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 5}], ids=["greedy", "drawn"])
def test_several_prompts_give_the_ids_of_each_alone(engine: Engine, sampling: dict[str, Any]) -> None:
    alone = [engine.complete(prompt, max_tokens=24, **sampling).ids for prompt in PROMPTS]
    together = engine.complete(PROMPTS, max_tokens=24, **sampling)
    assert [result.ids for result in together] == alone
    pieces = list(engine.generate(PROMPTS, max_tokens=24, **sampling))
    for index, ids in enumerate(alone):
        assert joined([piece for piece in pieces if piece.index == index])[1] == ids


def test_one_prompt_in_a_list_is_a_list(engine: Engine) -> None:
    assert isinstance(engine.complete(ONCE, max_tokens=1), Result)
    assert len(engine.complete([ONCE], max_tokens=1)) == 1
    assert len(engine.complete([[1, 2]], max_tokens=1)) == 1


def test_samplers_are_the_runtime_s(engine: Engine) -> None:
    options = SamplingOptions(temperature=0.8, top_k=20, seed=3)
    wanted = engine.complete(ONCE, max_tokens=10, temperature=0.8, top_k=20, top_p=1.0, min_p=0.0, seed=3).ids
    assert engine.complete(ONCE, max_tokens=10, sampling=options).ids == wanted
    assert engine.complete(ONCE, max_tokens=10, sampling=options, seed=4).ids != wanted


def test_logits_are_those_of_generated_tokens(engine: Engine) -> None:
    rows: list[np.ndarray] = []
    result = engine.complete(ONCE, max_tokens=3, temperature=0.0, on_logits=lambda row: rows.append(row.copy()))
    ids = [*engine.tokenize(ONCE), *result.ids]
    logits_TV = engine.logits(ids)
    assert logits_TV.shape == (len(ids), engine.config.vocabulary)
    assert (logits_TV[-4:-1] == np.stack(rows)).all()


def test_log_probabilities_are_those_of_the_logits(engine: Engine) -> None:
    pieces = list(engine.generate(ONCE, max_tokens=4, temperature=0.0, logprobs=2))
    result = engine.complete(ONCE, max_tokens=4, temperature=0.0, logprobs=2)
    assert tuple(piece.logprob for piece in pieces) == result.logprobs
    rows_TV = engine.logits([*engine.tokenize(ONCE), *result.ids])[-5:-1].astype(np.float64)
    for row_V, token, noted in zip(rows_TV, result.ids, result.logprobs, strict=True):
        expected_V = row_V - row_V.max() - np.log(np.exp(row_V - row_V.max()).sum())
        assert noted.id == token
        assert noted.logprob == pytest.approx(expected_V[token], abs=1e-5)
        assert [best for best, _ in noted.best] == np.argsort(-expected_V, kind="stable")[:2].tolist()
    assert engine.complete(ONCE, max_tokens=4, temperature=0.0).logprobs == ()


# ---- chat ----

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}. {% endfor %}Once upon"


def test_a_chat_is_framed_by_the_model_s_template(tmp_path: Path) -> None:
    shutil.copytree(demo_model_directory(), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    messages = [{"role": "user", "content": "Tell me"}]
    with Engine(tmp_path / "model", threads=1, quant="q8") as chatty:
        pieces = list(chatty.chat(messages, max_tokens=9, temperature=0.0))
        wanted = chatty.complete("user: Tell me. Once upon", max_tokens=9, temperature=0.0)
        assert joined(pieces) == (wanted.text, wanted.ids)
        assert pieces[-1].finish_reason == "length"
        with pytest.raises(UsageError, match="this model does not think"):
            chatty.chat(messages, thinking=True)
        with pytest.raises(UsageError, match="messages: message 1: role: expected one of"):
            chatty.chat([{"role": "me", "content": ""}])
        with pytest.raises(UsageError, match="messages: expected a list, found None"):
            chatty.chat(None)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="expected a text, found 5"):
            chatty.tokenize(5)  # type: ignore[arg-type]


def test_a_model_without_a_template_cannot_chat(tmp_path: Path) -> None:
    shutil.copytree(demo_model_directory(), tmp_path / "model", ignore=lambda *_: ["chat_template.jinja"])
    settings = tmp_path / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": None}))
    with Engine(tmp_path / "model", threads=1) as plain, pytest.raises(CheckpointError, match="has no chat template"):
        plain.chat([{"role": "user", "content": "Hi"}])


# ---- ends ----


def test_a_stop_string_across_tokens_is_not_shown(engine: Engine) -> None:
    whole = engine.complete(ONCE, max_tokens=20, temperature=0.0)
    stop = whole.text[12:21]  # begins and ends inside tokens
    pieces = list(engine.generate(ONCE, max_tokens=20, temperature=0.0, stop=["never there", stop]))
    assert joined(pieces)[0] == whole.text[: whole.text.index(stop)]
    assert (pieces[-1].finish_reason, pieces[-1].stop) == ("stop_string", stop)
    ids = joined(pieces)[1]
    assert ids == whole.ids[: len(ids)]
    assert stop in engine.detokenize(ids)
    assert stop not in engine.detokenize(ids[:-1])
    last = engine.complete(ONCE, max_tokens=len(ids), temperature=0.0, stop=stop)
    assert (last.finish_reason, last.stop, last.text) == ("stop_string", stop, joined(pieces)[0])


def test_a_stop_string_ends_only_its_own_sequence(engine: Engine) -> None:
    free = engine.complete(PROMPTS, max_tokens=16, temperature=0.0)
    stop = free[0].text[3:9]
    ended = engine.complete(PROMPTS, max_tokens=16, temperature=0.0, stop=stop)
    assert ended[0].finish_reason == "stop_string"
    for before, after in zip(free, ended, strict=True):
        assert after.ids == (before.ids if stop not in before.text else before.ids[: len(after.ids)])


def test_the_beginning_of_a_stop_string_comes_with_the_end(engine: Engine) -> None:
    whole = engine.complete(ONCE, max_tokens=8, temperature=0.0)
    held = engine.complete(ONCE, max_tokens=8, temperature=0.0, stop=whole.text[-3:] + "zzz")
    assert (held.text, held.finish_reason) == (whole.text, "length")


def test_each_end_has_its_reason(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.complete(ONCE, max_tokens=2).finish_reason == "length"
    first = engine.complete(ONCE, max_tokens=3, temperature=0.0).ids[2]
    monkeypatch.setitem(vars(engine.text), "stop_ids", frozenset([first]))
    stopped = engine.complete(ONCE, max_tokens=9, temperature=0.0)
    assert (stopped.finish_reason, stopped.ids[-1]) == ("stop", first)
    assert engine.detokenize(stopped.ids[:-1]) == stopped.text
    assert engine.complete(ONCE, max_tokens=9, temperature=0.0, ignore_eos=True).finish_reason == "length"
    left = iter([False, True])
    ended = engine.complete(ONCE, max_tokens=9, ignore_eos=True, interrupted=lambda: next(left))
    assert (ended.finish_reason, len(ended.ids)) == ("interrupted", 2)


def test_the_context_s_end_is_one(engine: Engine) -> None:
    with Engine(threads=1, context=10) as small:
        count = 10 - len(small.tokenize(ONCE))
        result = small.complete(ONCE, ignore_eos=True)
        assert (result.finish_reason, len(result.ids)) == ("context", count)
        full = small.complete([1] * 10)
        assert (full.finish_reason, full.ids, full.text) == ("context", (), "")
        with pytest.raises(UsageError, match="the prompt has 11 tokens, the context 10"):
            small.generate([1] * 11)


# ---- leaving early ----


def test_a_loop_that_is_left_ends_its_generation(engine: Engine) -> None:
    wanted = engine.complete(ONCE, max_tokens=20).ids
    for turn, _ in enumerate(engine.generate(PROMPTS, max_tokens=50)):
        if turn == 3:
            break
    assert engine.complete(ONCE, max_tokens=20).ids == wanted
    pieces = engine.generate(ONCE, max_tokens=50)
    next(pieces)
    pieces.close()
    with pytest.raises(StopIteration):
        next(pieces)
    engine.generate(ONCE)  # never begun
    assert engine.complete(ONCE, max_tokens=20).ids == wanted


def test_generations_take_turns(engine: Engine) -> None:
    wanted = [engine.complete(prompt, max_tokens=10).ids for prompt in PROMPTS[:2]]
    pairs = zip(*(engine.generate(prompt, max_tokens=10) for prompt in PROMPTS[:2]), strict=True)
    assert [joined(list(pieces))[1] for pieces in zip(*pairs, strict=True)] == wanted


def test_calls_inside_a_loop(engine: Engine) -> None:
    wanted = engine.complete(PROMPTS[1], max_tokens=4).ids
    for piece in engine.generate(ONCE, max_tokens=3):
        assert engine.tokenize(piece.text) == list(piece.ids)
        assert engine.complete(PROMPTS[1], max_tokens=4).ids == wanted


def test_ctrl_c_comes_between_steps(engine: Engine) -> None:
    wanted = engine.complete(ONCE, max_tokens=20).ids
    inside = engine.runtime.model.run_layers

    def run_layers(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return inside(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runtime.model, "run_layers", run_layers)
        with pytest.raises(KeyboardInterrupt):
            list(engine.generate(ONCE, max_tokens=5))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert engine.complete(ONCE, max_tokens=20).ids == wanted


def test_a_closed_engine_says_so() -> None:
    with Engine(threads=1) as engine:
        pieces = engine.generate(ONCE, max_tokens=30)
        next(pieces)
    assert list(pieces) == []
    engine.close()
    with pytest.raises(UsageError, match="this engine is closed: make a new one"):
        engine.complete(ONCE)


# ---- bad arguments ----

BAD = {
    "no prompt": ([], {}, "there is nothing to continue"),
    "a number": (5, {}, "prompt: expected text, token ids or a list of those, found 5"),
    "a float": ([1.5], {}, r"a prompt: expected text or a list of token ids, found \[1.5\]"),
    "beyond": ([1, 99999], {}, "token id 99999 is not in the vocabulary, 0 to 1023"),
    "no tokens": ([[]], {}, "the prompt has no tokens"),
    "max_tokens": (ONCE, {"max_tokens": 0}, "max_tokens: expected a whole number from 1 to 2147483647, found 0"),
    "temperature": (ONCE, {"temperature": float("nan")}, "temperature: expected a number from 0 to 100, found nan"),
    "top_p": (ONCE, {"top_p": 1.5}, "top_p: expected a number from 0 to 1, found 1.5"),
    "seed": (ONCE, {"seed": -1}, "seed: expected a whole number from 0 to .*, found -1"),
    "stop": (ONCE, {"stop": ["a", ""]}, "stop: expected a text of at least one character, or several, found ''"),
    "no stop": (ONCE, {"stop": 5}, "stop: expected a text or several, found 5"),
    "sampling": (ONCE, {"sampling": {"seed": 1}}, "sampling: expected SamplingOptions, found {'seed': 1}"),
    "logprobs": (ONCE, {"logprobs": -1}, "logprobs: expected a whole number from 0 to .*, found -1"),
    "on_logits": ([ONCE, ONCE], {"on_logits": print}, "on_logits: .* give one prompt at a time"),
}


@pytest.mark.parametrize(("prompt", "options", "message"), BAD.values(), ids=BAD)
def test_bad_calls_are_refused_before_the_first_piece(
    engine: Engine, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        engine.generate(prompt, **options)
    with pytest.raises(UsageError, match=message):
        engine.complete(prompt, **options)


BAD_ENGINES = {
    "kv": ({"kv": "q4"}, "kv: expected f32, f16 or q8, found 'q4'"),
    "experts": ({"experts": "all"}, "experts: expected auto, whole, sliced or shared, found 'all'"),
    "wire": ({"wire": "q8", "exchange": "alltoall"}, "wire q8 rounds .*, those of alltoall are always exact"),
    "threads": ({"threads": 0}, "threads: expected a whole number from 1 to 1024, found 0"),
    "context": ({"context": 10**9}, "context: 1000000000 is more than the model's maximum of 131072 positions"),
    "store": ({"store": "/nowhere"}, "^/nowhere: expected a store .*, but it does not exist"),
}


@pytest.mark.parametrize(("options", "message"), BAD_ENGINES.values(), ids=BAD_ENGINES)
def test_bad_options_are_refused_before_any_weight_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message), Engine(**options):
        pytest.fail("it opened")


def test_a_damaged_store_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(StoreError) as caught:
        Engine(tmp_path)
    assert isinstance(caught.value, DistMoeError)


# ---- the package ----


def test_importing_the_package_is_cheap() -> None:
    program = (
        "import sys, dist_moe; assert not {'numpy', 'mpi4py', 'cffi'} & {*sys.modules}; "
        "from dist_moe import Engine; assert 'mpi4py' not in sys.modules; dist_moe.nothing"
    )
    done = launching.run(sys.executable, "-c", program)
    assert "module 'dist_moe' has no attribute 'nothing'" in done.stderr, done.output


USER_SCRIPT = """
from dist_moe import Engine, Piece, Result

def story(engine: Engine, prompt: str) -> list[str]:
    pieces: list[Piece] = list(engine.generate(prompt, max_tokens=5, temperature=0.5, stop=["."]))
    one: Result = engine.complete(prompt, max_tokens=2)
    many: list[Result] = engine.complete([prompt, prompt], max_tokens=2)
    return [piece.text for piece in pieces] + [one.text] + [result.text for result in many]

with Engine("demo", kv="f16") as engine:
    print(story(engine, "Once"), engine.config.layers, engine.logits([1, 2]).shape)
"""


def test_a_user_s_script_is_typed(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(USER_SCRIPT)
    (tmp_path / "wrong.py").write_text(USER_SCRIPT.replace("max_tokens=5", "max_token=5"))
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    root = Path(__file__).resolve().parents[2]
    for script, code in (("script.py", 0), ("wrong.py", 1)):
        done = subprocess.run(
            [*command, str(tmp_path / script)], cwd=root, capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == code, done.stdout + done.stderr
    assert 'Unexpected keyword argument "max_token"' in done.stdout
