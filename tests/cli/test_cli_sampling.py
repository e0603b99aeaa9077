"""Sampling options of the command line: bad values, where they come from, and runs with several texts."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_moe.cli.main import execute
from dist_moe.errors import CheckpointError, UsageError
from dist_moe.parallel.world import AgreedError
from dist_moe.text.generation_config import read_generation_config
from helpers import launching

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "base"
BARE = ("-m", str(GOLDEN), "--quant", "f32", "--prompt-ids", "1,2,3")
PROGRAM = (sys.executable, "-m", "dist_moe")
Run = Callable[..., launching.Finished]

BAD_USE = [
    ("--typical-p 1.5", "--typical-p: expected a number from 0 to 1, found '1.5'"),
    ("--repetition-penalty 0", "--repetition-penalty: expected a number from 0.01 to 100, found '0'"),
    ("--repeat-last-n -2", "--repeat-last-n: expected a whole number from -1 to 2147483647, found '-2'"),
    ("--presence-penalty x", "--presence-penalty: expected a number from -100 to 100, found 'x'"),
    ("--frequency-penalty nan", "--frequency-penalty: expected a number from -100 to 100, found 'nan'"),
    ("--dry-multiplier -1", "--dry-multiplier: expected a number from 0 to 100, found '-1'"),
    ("--dry-base 0.5", "--dry-base: expected a number from 1 to 10, found '0.5'"),
    ("--dry-allowed-length 0", "--dry-allowed-length: expected a whole number from 1 to 2147483647, found '0'"),
    ("--dry-last-n -2", "--dry-last-n: expected a whole number from -1 to 2147483647, found '-2'"),
    ("--dry-breakers x", "--dry-breakers: expected a JSON list of texts that are not empty, like"),
    ('--dry-breakers ["\\ud800"]', "--dry-breakers: expected a JSON list of texts that are not empty, like"),
    ("--dry-breakers " + "[" * 100000, "--dry-breakers: expected a JSON list of texts that are not empty, like"),
    ('--dry-breakers [""]', "--dry-breakers: expected a JSON list of texts that are not empty, like"),
    ("--logit-bias 5", "--logit-bias: expected ID=BIAS with a bias of -1e+06 to 1e+06 or -inf, like 5=+1.5, found '5'"),
    ("--logit-bias 5=inf", "--logit-bias: expected ID=BIAS with a bias of -1e+06 to 1e+06 or -inf"),
    ("--logit-bias 5=1e9", "--logit-bias: expected ID=BIAS"),
    ("--logit-bias 5=2000000", "--logit-bias: expected ID=BIAS"),
    ("--logit-bias -5=1", "--logit-bias: expected ID=BIAS"),
    ("--logit-bias 5=1 --logit-bias 99999=1", "--logit-bias: token id 99999 at position 1 is not in the vocabulary"),
    ("--samples 0", "--samples: expected a whole number from 1 to 1024, found '0'"),
    ("--beams 129", "--beams: expected a whole number from 1 to 128, found '129'"),
    ("--length-penalty -1", "--length-penalty: expected a number from 0 to 10, found '-1'"),
    ("--logprobs 257", "--logprobs: expected a whole number from 0 to 256, found '257'"),
    ("--logprobs 2", "--logprobs is printed with --json only: add --json"),
    ("--samples 2 --beams 2", "--samples and --beams exclude each other"),
    ("--beams 2 --top-k 3", "--top-k does nothing in a beam search"),
    ("--beams 2 --logit-bias 5=1", "--logit-bias does nothing in a beam search"),
    ("--samples 2 --logits x.npy", "--logits is about a single text: leave --samples out, or it"),
    ("--beams 2 --stop x", "--stop is about a single text: leave --beams out, or it"),
    ("--samples 2 --prompt-cache x", "--prompt-cache is about a single text: leave --samples out, or it"),
]


@pytest.mark.parametrize(("line", "message"), BAD_USE)
def test_bad_use_is_one_line(line: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_moe.engine.start.loading.Transformer", None)  # before any weight is loaded
    with pytest.raises((UsageError, AgreedError)) as caught:
        execute(["run", "--prompt-ids", "1,2", *line.split()])
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1


def printed_config(*arguments: str) -> dict[str, str]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        execute(["run", *arguments, "--print-config"])
    return dict(line.split(" = ", 1) for line in output.getvalue().splitlines() if not line.startswith("#"))


def test_biases_come_from_flags_environment_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = printed_config("-p", "a", "--logit-bias", "5=+1.5", "--logit-bias", "007=-INF")
    assert flags["logit_bias"] == '["5=+1.5", "7=-inf"]  # flag'
    file = tmp_path / "run.toml"
    for text in ('logit_bias = ["5=+1.5", "7=-inf"]\n', 'logit-bias = "5=+1.5"\n'):
        file.write_text(text)
        expected = json.loads(text.split(" = ")[1])
        expected = expected if isinstance(expected, list) else [expected]
        found = printed_config("-p", "a", "--config", str(file))["logit_bias"]
        assert found == f"{json.dumps(expected)}  # config {file}"
    monkeypatch.setenv("DIST_MOE_LOGIT_BIAS", "5=1 6=2")
    assert printed_config("-p", "a")["logit_bias"] == '["5=1", "6=2"]  # environment DIST_MOE_LOGIT_BIAS'
    monkeypatch.delenv("DIST_MOE_LOGIT_BIAS")
    file.write_text("logit_bias = [[1, 2]]\n")
    with pytest.raises(UsageError, match="logit_bias: expected ID=BIAS"):
        printed_config("-p", "a", "--config", str(file))


def test_what_is_printed_can_be_read_back(tmp_path: Path) -> None:
    given = ("--logit-bias", "5=1", "--dry-breakers", '["\\n", "\\"x"]', "--typical-p", "0.9", "--samples", "3")
    values = printed_config("-p", "a", *given)
    file = tmp_path / "copy.toml"
    file.write_text("".join(f"{name} = {value}\n" for name, value in values.items()))
    again = printed_config("--config", str(file))
    for name in ("logit_bias", "dry_breakers", "typical_p", "samples", "repeat_last_n"):
        assert again[name].split("  # ")[0] == values[name].split("  # ")[0]


def test_the_models_advice(tmp_path: Path) -> None:
    def advise(**values: object) -> None:
        (tmp_path / "generation_config.json").write_text(json.dumps(values))

    advise(do_sample=True, temperature=0.7, typical_p=0.9, repetition_penalty=1.05)
    found = read_generation_config(tmp_path)
    assert (found.temperature, found.typical_p, found.repetition_penalty) == (0.7, 0.9, 1.05)
    advise(do_sample=False, temperature=0.7, typical_p=0.9, repetition_penalty=1.05)
    found = read_generation_config(tmp_path)
    assert (found.temperature, found.typical_p, found.repetition_penalty) == (0.0, 1.0, 1.05)
    advise(repetition_penalty=0)
    with pytest.raises(CheckpointError, match=r"repetition_penalty: expected a number from 0\.01 to 100, found 0"):
        read_generation_config(tmp_path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a command without a launcher; it must succeed."""
    environment = {"DIST_MOE_CACHE": str(tmp_path_factory.mktemp("cache")), "DIST_MOE_THREADS": "1"}

    def run(*arguments: str) -> launching.Finished:
        done = launching.run(*PROGRAM, "run", *arguments, env=environment)
        assert done.code == 0, done.output
        return done

    return run


def test_logprobs_are_those_of_the_written_logits(alone: Run, tmp_path: Path) -> None:
    how = (*BARE, "-n", "6", "--temperature", "0.7", "--repetition-penalty", "1.3", "--ignore-eos", "--json")
    found = json.loads(alone(*how, "--logprobs", "3").stdout)
    assert json.loads(alone(*how, "--logits", str(tmp_path / "x.npy")).stdout)["ids"] == found["ids"]
    logits_TV = np.load(tmp_path / "x.npy").astype(np.float64)
    logits_TV -= logits_TV.max(axis=1, keepdims=True)
    expected_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
    assert [token["id"] for token in found["logprobs"]] == found["ids"]
    for row, token in zip(expected_TV, found["logprobs"], strict=True):
        assert token["logprob"] == pytest.approx(row[token["id"]], abs=1e-5)
        assert [best["id"] for best in token["best"]] == np.argsort(-row, kind="stable")[:3].tolist()
        assert [best["logprob"] for best in token["best"]] == pytest.approx(np.sort(row)[::-1][:3], abs=1e-5)
    assert found["logprob"] == pytest.approx(sum(token["logprob"] for token in found["logprobs"]), abs=1e-5)
    assert "choices" not in found


def test_samples_are_those_of_single_seeds_and_ranked(alone: Run) -> None:
    how = (*BARE, "-n", "8", "--temperature", "1", "--seed", "4", "--json")
    found = json.loads(alone(*how, "--samples", "5").stdout)
    choices = found["choices"]
    assert sorted(choice["sample"] for choice in choices) == [0, 1, 2, 3, 4]
    assert [choice["rank"] for choice in choices] == [1, 2, 3, 4, 5]
    scores = [choice["score"] for choice in choices]
    assert scores == sorted(scores, reverse=True) == [choice["logprob"] for choice in choices]
    assert found["ids"] == choices[0]["ids"]
    first = next(choice for choice in choices if choice["sample"] == 0)
    assert json.loads(alone(*how).stdout)["ids"] == first["ids"]
    mean = json.loads(alone(*how, "--samples", "5", "--length-penalty", "1").stdout)["choices"]
    assert [choice["score"] for choice in mean] == pytest.approx(
        [choice["logprob"] / len(choice["ids"]) for choice in mean], abs=1e-6
    )


def test_beams_are_printed_best_first(alone: Run) -> None:
    done = alone("-p", "Once upon a time", "-n", "9", "--beams", "3", "--length-penalty", "1")
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("--- ")] == [f"--- {i} of 3" for i in (1, 2, 3)]
    assert sum(line.startswith("Once upon a time") for line in lines) == 3
    scores = [float(line.split("score ")[1].split(",")[0]) for line in lines if line.startswith("--- ")]
    assert scores == sorted(scores, reverse=True)
    assert "prefill 4 tokens" in done.stderr
    one = json.loads(alone("-p", "Once upon a time", "-n", "9", "--beams", "1", "--json").stdout)
    greedy = json.loads(alone("-p", "Once upon a time", "-n", "9", "--temperature", "0", "--json").stdout)
    assert (one["ids"], one["text"]) == (greedy["ids"], greedy["text"])


def test_dry_and_bans_change_a_text(alone: Run) -> None:
    how = ("-p", "a b c a b c a b", "-n", "12", "--temperature", "0", "--json")
    plain = json.loads(alone(*how).stdout)["ids"]
    banned = json.loads(alone(*how, "--logit-bias", f"{plain[0]}=-inf").stdout)["ids"]
    assert plain[0] not in banned
    dry = json.loads(alone(*how, "--dry-multiplier", "5", "--dry-allowed-length", "1").stdout)["ids"]
    assert dry != plain
