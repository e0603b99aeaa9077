"""dist-moe verify trace: a reference of this model passes; a broken one, or another model's, does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_moe.checkpoint.hf_config import read_hf_config
from dist_moe.cli.main import execute
from dist_moe.cli.reference_file import KIND, read_reference
from dist_moe.cli.reference_trace import ComparedStep, Tolerances
from dist_moe.engine.engine import Engine
from dist_moe.errors import TraceMismatch, UsageError
from dist_moe.model_config import ModelConfig
from dist_moe.parallel.world import AgreedError

BASE = Path(__file__).parents[1] / "golden" / "models" / "base"
Change = Callable[[dict[str, np.ndarray]], None]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIST_MOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("DIST_MOE_QUANT", "f32")
        yield


def sizes_of(config: ModelConfig) -> dict[str, object]:
    names = ("layers", "model_dim", "heads", "kv_heads", "head_dim", "experts", "experts_per_token", "vocabulary")
    return {name: getattr(config, name) for name in names} | {"inv_freq": config.inv_freq.tolist()}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """What tools/make_reference.py writes: transformers' own greedy tokens; logits are ours, of the same steps."""
    with np.load(BASE / "golden.npz") as golden:
        prompt, greedy = golden["prompt_ids"], golden["greedy_ids"][:8]
    with Engine(BASE, quant="f32", threads=1) as engine:
        logits_TV = engine.logits([*prompt.tolist(), *greedy.tolist()])[len(prompt) - 1 : -1]
    facts = {"kind": KIND, "model": "base", "sizes": sizes_of(read_hf_config(BASE))}
    ids = {"prompt_ids": prompt, "expected_ids": greedy}
    return {**ids, "logits": logits_TV, "facts": np.array(json.dumps(facts))}


@pytest.fixture
def reference(arrays: dict[str, np.ndarray], tmp_path: Path) -> Callable[..., str]:
    def write(change: Change = lambda _: None, name: str = "reference.npz") -> str:
        changed = {key: np.array(array) for key, array in arrays.items()}
        change(changed)
        np.savez(tmp_path / name, **changed)
        return str(tmp_path / name)

    return write


def verify(*arguments: str) -> None:
    execute(["verify", "trace", *arguments, "-m", str(BASE), "--threads", "1"])


def test_transformers_tokens_pass(reference: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    verify(reference(), "--logit-rmse", "1e-3", "--prob-mae", "1e-6")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("step 0: expected ")
    assert lines[-1].startswith("PASS: 8 of 8 steps as in ")
    assert "(at most 0.001)" in lines[-1]
    verify(str(Path(reference()).parent), "--steps", "3", "-o", "json")
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert [step["step"] for step in found["steps"]] == [0, 1, 2]


def other_token(arrays: dict[str, np.ndarray]) -> None:
    arrays["expected_ids"][7] = (arrays["expected_ids"][7] + 1) % 100


def shifted(arrays: dict[str, np.ndarray]) -> None:
    arrays["logits"][5, ::2] += 0.5


def test_a_broken_reference_fails(reference: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    path = reference(other_token)
    with pytest.raises((TraceMismatch, AgreedError), match=r"step 7 expects token \d+, the model gives") as caught:
        verify(path)
    assert caught.value.exit_code == 2
    assert "FAIL: 7 of 8 steps" in capsys.readouterr().out
    verify(path, "--mismatches", "1")
    path = reference(shifted)
    verify(path)  # errors decide only where a tolerance is given
    with pytest.raises((TraceMismatch, AgreedError), match=r"step 5: logit rmse 0\.35\d* is above 0\.01"):
        verify(path, "--logit-rmse", "0.01")
    with pytest.raises((TraceMismatch, AgreedError), match=r"step 5: prob mae .* is above 1e-06"):
        verify(path, "--prob-mae", "1e-6")


def test_errors_that_are_no_numbers_fail() -> None:
    steps = [ComparedStep(0, 1, 1, float("nan"), None)]
    assert Tolerances(logit_rmse=1e9).verdict(steps) == "step 0: logit rmse nan is above 1e+09"
    assert Tolerances(prob_mae=0.0).verdict(steps) is None  # the trace has none


def facts(**sizes: object) -> Change:
    def change(arrays: dict[str, np.ndarray]) -> None:
        told = json.loads(str(arrays["facts"]))
        told["sizes"] |= sizes
        arrays["facts"] = np.array(json.dumps(told))

    return change


def drop(key: str) -> Change:
    def change(arrays: dict[str, np.ndarray]) -> None:
        del arrays[key]

    return change


def put(key: str, value: object) -> Change:
    return lambda arrays: arrays.update({key: np.array(value)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (facts(layers=99), "is of another model: it has layers 99, and this one"),
        (facts(vocabulary=7), "is of another model: it has vocabulary 7, and this one"),
        (facts(inv_freq=[1.0] * 3), "is of another model: its rotary frequencies are others"),
        (drop("logits"), "not a reference trace"),
        (drop("facts"), "not a reference trace"),
        (put("facts", "{}"), "not a reference trace"),
        (put("facts", "[]"), "not a reference trace"),
        (put("expected_ids", [1.5]), "expected_ids: expected token ids, found float64"),
        (put("prompt_ids", [10**6]), "prompt_ids: token id 1000000 at position 0 is not in the vocabulary"),
        (put("logits", np.zeros((2, 3), np.float32)), "logits: expected floats [8, "),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(reference: Callable[..., str], change: Change, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_reference(reference(change), None, read_hf_config(BASE))
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_are_no_references(tmp_path: Path, reference: Callable[..., str]) -> None:
    config = read_hf_config(BASE)
    (tmp_path / "text.npz").write_text("no archive")
    for name, words in (("text.npz", "not a reference trace"), ("absent.npz", "there is no such file")):
        with pytest.raises(UsageError, match=words):
            read_reference(str(tmp_path / name), None, config)
    with pytest.raises(UsageError, match=r"--steps 9: .* has 8 steps: give 8 at most"):
        read_reference(reference(), 9, config)
    with pytest.raises(UsageError, match=r"expected one reference .* found reference.npz, text.npz: name it"):
        read_reference(str(tmp_path), None, config)
    assert read_reference(reference(), 8, replace(config, eps=np.float32(1))).first_row == 0
