"""Old habits: run STORE STEPS [TRACE], -s/--steps, --show-tokens."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_moe.cli.main import execute
from dist_moe.cli.reference_trace import ComparedStep, read_trace
from dist_moe.cli.token_lines import token_line
from dist_moe.demo import demo_model_directory
from dist_moe.errors import UsageError
from dist_moe.text.tokenizer import Tokenizer
from helpers import launching

GOLDEN = str(Path(__file__).parents[1] / "golden" / "models" / "base")
PROGRAM = (sys.executable, "-m", "dist_moe")
PROMPT, STEPS = "5,6,7", 6

Run = Callable[..., launching.Finished]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    names = {"DIST_MOE_THREADS": "1", "DIST_MOE_QUANT": "f32"}
    return {"DIST_MOE_CACHE": str(tmp_path_factory.mktemp("cache")), **names}


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    def start(*arguments: str, code: int = 0, **variables: str) -> launching.Finished:
        done = launching.run(*PROGRAM, *arguments, env=environment | variables)
        assert done.code == code, done.output
        return done

    return start


@pytest.fixture(scope="module")
def trace(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace as the predecessor's tool writes it, made of our own greedy run: ids, and a row per generated token."""
    base = tmp_path_factory.mktemp("trace") / "q3"
    options = ("-m", GOLDEN, "--prompt-ids", PROMPT, "-n", str(STEPS), "--temperature", "0", "--ignore-eos", "--json")
    done = launching.run(*PROGRAM, "run", *options, "--logits", f"{base}.logits.npy", env=environment)
    assert done.code == 0, done.output
    base.with_name("run.json").write_text(done.stdout)
    ids = [int(token) for token in PROMPT.split(",")] + json.loads(done.stdout)["ids"]
    np.save(f"{base}.ids.npy", np.array(ids, np.int32))
    logits_TV = np.load(f"{base}.logits.npy").astype(np.float64)
    exponentials = np.exp(logits_TV - logits_TV.max(axis=1, keepdims=True))
    np.save(f"{base}.probs.npy", (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32))
    return base


def copied(trace: Path, directory: Path, change: Callable[[np.ndarray], None], part: str) -> str:
    for path in trace.parent.glob("q3.*"):
        (directory / path.name).write_bytes(path.read_bytes())
    array = np.load(directory / f"q3.{part}.npy")
    change(array)
    np.save(directory / f"q3.{part}.npy", array)
    return str(directory / "q3")


# ---- STORE STEPS ----


def test_the_form_is_a_greedy_run(run: Run, trace: Path) -> None:
    ids = np.load(f"{trace}.ids.npy")[3:].tolist()
    done = run("run", GOLDEN, str(STEPS), "--prompt-ids", PROMPT, "--quiet")
    assert [int(token) for token in done.stdout.split(",")] == ids
    # What the environment says of sampling is weaker than the form.
    loud = run("run", GOLDEN, str(STEPS), "--prompt-ids", PROMPT, "--quiet", DIST_MOE_TEMPERATURE="50")
    assert loud.stdout == done.stdout
    for spelling in ("-s", "--steps", "-n", "--max-tokens"):
        options = ("-m", GOLDEN, "--prompt-ids", PROMPT, spelling, str(STEPS), "--temperature", "0", "--ignore-eos")
        assert run("run", *options, "--quiet").stdout == done.stdout


def test_neither_the_makers_advice_nor_an_end_token_changes_it(run: Run, trace: Path, tmp_path: Path) -> None:
    ids = np.load(f"{trace}.ids.npy")[3:].tolist()
    shutil.copytree(GOLDEN, tmp_path / "model")
    advice = {"do_sample": True, "temperature": 50.0, "eos_token_id": ids[1]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(advice))
    done = run("run", str(tmp_path / "model"), str(STEPS), "--prompt-ids", PROMPT, "--quiet")
    assert [int(token) for token in done.stdout.split(",")] == ids


def test_without_a_prompt_it_begins_with_a_known_token(run: Run) -> None:
    done = json.loads(run("run", GOLDEN, "2", "--json").stdout)
    assert (done["usage"]["prompt_tokens"], done["usage"]["completion_tokens"]) == (1, 2)
    begun = json.loads(run("run", GOLDEN, "2", "--json", "--prompt-ids", "0").stdout)
    assert begun["ids"] == done["ids"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("run store", "Got unexpected extra argument (store)"),
        ("run a b c d", "has two or three words"),
        ("run store five", "STEPS: expected a whole number from 1 to 2147483647, found 'five'"),
        ("run store 0", "STEPS: expected a whole number"),
        ("run store 5 -m other", "leave --model out"),
        ("run store 5 -n 6", "leave --max-tokens out"),
        ("run store 5 --temperature 1", "leave --temperature out"),
        ("run store 5 --seed 1", "leave --seed out"),
        ("run store 5 trace --logits x.npy", "leave --logits out"),
        ("run store 5 trace --show-tokens", "leave --show-tokens out"),
        ("run store 5 -p a --prompt-ids 1", "exclude each other"),
    ],
)
def test_contradictions_are_one_line(line: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        execute(line.split())
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_empty_word_is_named_by_the_form() -> None:
    with pytest.raises(UsageError, match=r"^STORE STEPS \[TRACE\]: expected the name of a file or directory"):
        execute(["run", "", "5"])


# ---- TRACE ----


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trace_of_our_own_passes_bit_by_bit(ranks: int, trace: Path, environment, mpirun: Run) -> None:
    done = mpirun(ranks, *PROGRAM, "run", GOLDEN, str(STEPS), str(trace), env=environment)
    assert done.code == 0, done.output
    ids = np.load(f"{trace}.ids.npy")[3:].tolist()
    lines = done.stdout.splitlines()
    for step, (token, line) in enumerate(zip(ids, lines, strict=False)):
        assert line.startswith(f"step {step}: expected {token}, got {token} OK, logit rmse 0, prob mae "), line
        assert float(line.split()[-1]) < 1e-8
    assert lines[-1] == f"PASS: {STEPS} of {STEPS} steps as in {trace}"


def test_a_token_that_differs_fails_alone_with_code_2(run: Run, trace: Path, tmp_path: Path) -> None:
    base = copied(trace, tmp_path, lambda ids: ids.__setitem__(5, (ids[5] + 1) % 100), "ids")
    done = run("run", GOLDEN, "4", base, code=2)
    words = [line.split()[6].rstrip(",") for line in done.stdout.splitlines()[:4]]
    # Step 3 continues the trace's own token, so only its logits are off.
    assert words[:3] == ["OK", "OK", "MISMATCH"]
    assert "FAIL: " in done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert f"{base}: step 2 expects token" in done.stderr
    found = json.loads(run("run", GOLDEN, "3", base, "--json", code=2).stdout)
    assert [step["ok"] for step in found["steps"]] == [True, True, False]
    assert found["passed"] is False


def test_the_rmse_is_that_of_the_rows(run: Run, trace: Path, tmp_path: Path) -> None:
    def shift(logits_TV: np.ndarray) -> None:
        logits_TV[1] += 0.5

    base = copied(trace, tmp_path, shift, "logits")
    found = json.loads(run("run", GOLDEN, "3", base, "--json").stdout)
    assert [step["logit_rmse"] for step in found["steps"]] == pytest.approx([0, 0.5, 0], abs=1e-6)


def test_a_list_of_ids_is_a_trace_too(run: Run, trace: Path, tmp_path: Path) -> None:
    ids = np.load(f"{trace}.ids.npy").tolist()
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    np.save(tmp_path / "ids.npy", np.array(ids))
    for name in ("ids.json", "ids.npy"):
        done = run("run", GOLDEN, "4", str(tmp_path / name), "--prompt-ids", PROMPT)
        assert "PASS: 4 of 4" in done.stdout
        assert "rmse" not in done.stdout
    # What run --json prints holds the answer alone.
    said = str(trace.with_name("run.json"))
    assert "PASS: 6 of 6" in run("run", GOLDEN, str(STEPS), said, "--prompt-ids", PROMPT).stdout
    assert "give its prompt, too" in run("run", GOLDEN, "2", said, code=2).stderr


def test_rows_for_every_token_begin_at_the_second(trace: Path, run: Run, tmp_path: Path) -> None:
    ids = np.load(f"{trace}.ids.npy")
    np.save(tmp_path / "all.ids.npy", ids)
    text = ",".join(map(str, ids.tolist()))
    run("logits", "-m", GOLDEN, "--ids", text, "-o", str(tmp_path / "all.logits.npy"))
    done = run("run", GOLDEN, str(STEPS), str(tmp_path / "all"), "--prompt-ids", PROMPT)
    assert done.stdout.count("logit rmse 0\n") == STEPS


@pytest.mark.parametrize(
    ("name", "prompt", "steps", "words"),
    [
        ("nowhere", None, 1, "there is no nowhere.ids.npy"),
        ("{}", None, 7, "has 6 tokens after its prompt of 3: give 6 steps at most"),
        ("{}", (5, 7), 2, "begins with other tokens than the prompt"),
        ("{}.json", None, 2, "not valid JSON"),
        ("{}.deep.json", None, 2, "not valid JSON"),
        ("{}.wide", None, 2, "expected floats"),
        ("{}.long", None, 2, "has 40 rows, but the trace 9 ids"),
        ("{}.empty", None, 2, "not an array"),
        ("{}.zip", None, 2, "not an array"),
    ],
)
def test_a_trace_that_does_not_fit_is_refused(name: str, prompt, steps: int, words: str, trace: Path) -> None:
    trace.with_name("q3.json").write_text("{")
    trace.with_name("q3.deep.json").write_text("[" * 10**5)
    for kind, shape in (("wide", (6, 5)), ("long", (40, 384))):
        np.save(f"{trace}.{kind}.ids.npy", np.load(f"{trace}.ids.npy"))
        np.save(f"{trace}.{kind}.logits.npy", np.zeros(shape, np.float32))
    for kind, data in (("empty", b""), ("zip", b"PK\x03\x04")):
        np.save(f"{trace}.{kind}.ids.npy", np.load(f"{trace}.ids.npy"))
        Path(f"{trace}.{kind}.logits.npy").write_bytes(data)
    vocabulary = np.load(f"{trace}.logits.npy").shape[1]
    if name == "{}.long":
        np.save(f"{trace}.long.logits.npy", np.zeros((40, vocabulary), np.float32))
    with pytest.raises(UsageError, match=words):
        read_trace(name.format(trace), prompt, steps, vocabulary)


# ---- --show-tokens ----


def test_tokens_are_shown_one_by_one(environment: dict[str, str]) -> None:
    arguments = ("run", "-p", "Once upon\n", "-n", "3", "--temperature", "0", "--ignore-eos", "--show-tokens")
    done = launching.run(*PROGRAM, *arguments, env=environment)
    assert done.code == 0, done.output
    tokenizer = Tokenizer(demo_model_directory())
    lines, text = done.stdout.split("\n\n", 1)
    found = [int(line[1 : line.index("]")]) for line in lines.splitlines()]
    assert lines.splitlines() == [token_line(tokenizer, token) for token in found]
    prompt = tokenizer.encode("Once upon\n")
    assert found[: len(prompt)] == prompt
    assert text.startswith("Once upon\n" + tokenizer.decode(found[len(prompt) :]))
    said = json.loads(launching.run(*PROGRAM, *arguments, "--json", env=environment).stdout)
    assert said["tokens"] == lines.splitlines()


def test_pieces_are_escaped() -> None:
    tokenizer = Tokenizer(demo_model_directory())
    assert token_line(None, 7) == "[7]"
    (newline,) = tokenizer.encode("\n")
    assert token_line(tokenizer, newline) == f'[{newline}] -> "\\n"'
    pieces = {token_line(tokenizer, token).partition(" -> ")[2] for token in range(tokenizer.size)}
    assert {'"\\""', '"\\\\"', '"\\xff"', '"\\x00"'} <= pieces
    assert all("\n" not in piece and piece[0] == piece[-1] == '"' for piece in pieces)
    special = tokenizer.eos_id
    assert special is not None
    assert token_line(tokenizer, special) == f'[{special}] -> "{tokenizer.special_text(special)}"'


def test_json_has_no_nan() -> None:
    entries = ComparedStep(0, 5, 5, float("nan"), 0.5).entries
    assert entries == {"step": 0, "expected": 5, "got": 5, "logit_rmse": None, "prob_mae": 0.5, "ok": True}
    json.dumps(entries, allow_nan=False)
