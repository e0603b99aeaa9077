"""`dist-moe perplexity`: against definitions in NumPy, over windows, beside a base, on several ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_moe.cli.main import execute
from dist_moe.demo import demo_model_directory
from dist_moe.engine.perplexity import Mean, Perplexity, compare, compare_rows, log_softmax
from dist_moe.engine.text_windows import pieces_of, windows_of
from dist_moe.parallel.world import AgreedError
from dist_moe.text.tokenizer import Tokenizer
from helpers.launching import Finished

PROGRAM = (sys.executable, "-m", "dist_moe")
MpiRun = Callable[..., Finished]
END = "<|endoftext|>"
STORIES = "Once upon a time there was a dog.<|endoftext|>A cat had a red hat. It was lost.<|endoftext|>"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(STORIES)
    return path


@pytest.fixture
def measure(text: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict]:
    def run(*arguments: str) -> dict:
        execute(["perplexity", str(text), "--json", *arguments])
        return json.loads(capsys.readouterr().out)

    return run


def reference(tmp_path: Path, pieces: list[tuple[list[int], int]], quant: str) -> np.ndarray:
    """Log-probabilities by the definition: each piece's logits, and of which position on its tokens count."""
    found = []
    for number, (ids, scored) in enumerate(pieces):
        output = tmp_path / f"{number}.npy"
        execute(["logits", "--ids", ",".join(map(str, ids)), "-o", str(output), "--quant", quant])
        logits_TV = np.load(output).astype(np.float64)
        logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
        found += [logp_TV[place - 1, ids[place]] for place in range(scored, len(ids))]
    return np.array(found)


@pytest.mark.parametrize(
    ("tokens", "size", "stride"), [(1, 4, 2), (2, 4, 2), (9, 4, 3), (10, 4, 1), (11, 5, 2), (8, 8, 4)]
)
def test_windows_predict_every_token_once(tokens: int, size: int, stride: int) -> None:
    windows = list(windows_of(tokens, size, stride))
    counted = [place for window in windows for place in range(window.scored, window.stop)]
    assert counted == list(range(1, tokens))
    for window in windows:
        assert 0 <= window.first < window.scored < window.stop <= window.first + size
        assert window.first == 0 or window.scored - window.first >= size - stride


@pytest.mark.parametrize(("tokens", "size", "counts"), [(0, 4, []), (1, 4, [1]), (8, 4, [4, 4]), (9, 4, [4, 4, 1])])
def test_pieces_have_every_token_once(tokens: int, size: int, counts: list[int]) -> None:
    pieces = pieces_of(list(range(tokens)), size)
    assert [len(piece) for piece in pieces] == counts
    assert [token for piece in pieces for token in piece] == list(range(tokens))


def test_perplexity_of_documents_equals_its_definition(measure, tmp_path: Path) -> None:
    tokenizer = Tokenizer(demo_model_directory())
    documents = [tokenizer.encode_trusted(part + END) for part in STORIES.split(END)[:-1]]
    expected = reference(tmp_path, [(ids, 1) for ids in documents], "f32")
    found = measure("--quant", "f32", "--split", END)
    assert (found["tokens"], found["documents"], found["windows"]) == (len(expected), 2, 2)
    assert found["perplexity"] == pytest.approx(np.exp(-expected.mean()), rel=1e-12)
    error = expected.std(ddof=1) / np.sqrt(len(expected)) * np.exp(-expected.mean())
    assert found["error"] == pytest.approx(error, rel=1e-12)


def test_perplexity_of_overlapping_windows_equals_its_definition(measure, tmp_path: Path) -> None:
    ids = Tokenizer(demo_model_directory()).encode(STORIES)
    pieces, scored, first = [], 1, 0
    while scored < len(ids):
        pieces.append((ids[first : first + 9], scored - first))
        scored, first = min(first + 9, len(ids)), first + 4
    expected = reference(tmp_path, pieces, "q8")
    found = measure("--quant", "q8", "--window", "9", "--stride", "4")
    assert (found["tokens"], found["windows"]) == (len(ids) - 1, len(pieces))
    assert found["perplexity"] == pytest.approx(np.exp(-expected.mean()), rel=1e-12)


def test_a_store_beside_itself_has_no_divergence_and_another_one_has(measure, tmp_path: Path) -> None:
    base = str(tmp_path / "base.npz")
    alone = measure("--quant", "q8", "--kl-base", base)
    same = measure("--quant", "q8", "--kl-base", base)
    assert same["perplexity"] == alone["perplexity"]
    assert same["comparison"]["kl"] == {"value": 0.0, "error": 0.0}
    assert same["comparison"]["kl_max"] == 0.0
    assert same["comparison"]["same_top"]["value"] == 1.0
    assert same["comparison"]["ratio"]["value"] == 1.0
    other = measure("--quant", "q4", "--kl-base", base)["comparison"]
    assert 0 < other["kl_median"] < other["kl"]["value"] < other["kl_max"]
    assert other["base"]["value"] == alone["perplexity"]


def test_rows_are_compared_as_the_definition_says() -> None:
    generator = np.random.default_rng(5)
    here, base = generator.normal(0, 3, (2, 50, 70)).astype(np.float32)
    base[3, 4:] = -np.inf  # certain but for 4 tokens
    targets = generator.integers(0, 70, 50).astype(np.int32)
    targets[3] = 2
    p, q = np.exp(log_softmax(base)), log_softmax(here)
    kl = np.array([sum(p[n, v] * (np.log(p[n, v]) - q[n, v]) for v in range(70) if p[n, v] > 0) for n in range(50)])
    found = compare_rows(here, base, targets)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-9)
    assert (found.same_top == (here.argmax(axis=1) == base.argmax(axis=1))).all()
    whole = compare(
        [compare_rows(here[:20], base[:20], targets[:20]), compare_rows(here[20:], base[20:], targets[20:])]
    )
    assert whole.kl == Mean.of(found.kl)
    assert whole.base == Perplexity.of(found.base_logprob)
    assert whole.ratio.value == pytest.approx(np.exp(found.base_logprob.mean() - found.logprob.mean()))


def test_the_same_numbers_on_three_ranks(mpirun: MpiRun, measure, text: Path, tmp_path: Path) -> None:
    alone = measure("--quant", "q4", "--window", "9")
    done = mpirun(3, *PROGRAM, "perplexity", str(text), "--json", "--quant", "q4", "--window", "9")
    there = json.loads(done.stdout)
    assert {**alone, "tokens_per_s": 0} == {**there, "tokens_per_s": 0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--window", "9", "--stride", "9"), "--stride 9: expected less than --window 9, so that windows overlap"),
        (("--window", "999999999"), "--window 999999999 is more than the model's maximum"),
        (("--split", "was"), None),
        (("--kl-base", "/nowhere/at/all.npz"), "cannot be written"),
    ],
)
def test_options_that_do_not_fit(text: Path, arguments: tuple[str, ...], said: str | None) -> None:
    if said is None:
        execute(["perplexity", str(text), *arguments])
        return
    with pytest.raises(AgreedError, match=said):
        execute(["perplexity", str(text), *arguments])


def test_a_base_of_another_text_or_none_at_all(measure, text: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.npz"
    measure("--kl-base", str(base))
    with pytest.raises(AgreedError, match="was written for another text, or with another --window"):
        measure("--kl-base", str(base), "--split", END)
    data = base.read_bytes()
    for damaged in (b"", b"nothing", data[:-300], data.replace(b"targets", b"forgets")):
        base.write_bytes(damaged)
        with pytest.raises(AgreedError, match="not the logits of a reference"):
            measure("--kl-base", str(base))
    text.write_text("x")
    with pytest.raises(AgreedError, match="a single token predicts nothing: give a longer text"):
        measure()
