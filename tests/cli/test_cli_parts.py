"""The parts of the commands that need no engine: files of ids, .npy files, prompts, models, logs, output."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest

from dist_moe.cli.logs import start_logging
from dist_moe.cli.models import find_model
from dist_moe.cli.npy_rows import NpyRows
from dist_moe.cli.options import RunOptions
from dist_moe.cli.output import Output
from dist_moe.cli.prompt import Prompt, read_prompt
from dist_moe.cli.sampling import sampling_options
from dist_moe.cli.token_ids import parse_ids, read_ids, require_ids
from dist_moe.cli.values import unescape
from dist_moe.demo import demo_model_directory
from dist_moe.engine.requests.pieces import Result, Usage
from dist_moe.engine.requests.request import Completion, SamplingOptions
from dist_moe.engine.requests.writer import Writer
from dist_moe.engine.watch.statistics import EngineStatistics
from dist_moe.errors import UsageError
from dist_moe.files import require_writable
from dist_moe.kernels import WeightFormat
from dist_moe.parallel.launcher import Launcher
from dist_moe.store.models import ModelSource, cache_directory
from dist_moe.text.generation_config import GenerationConfig
from dist_moe.text.tokenizer import Tokenizer
from helpers.command_options import MODEL, RUN

ALONE = Launcher()
STATISTICS = EngineStatistics(0.5, 10, 0.1, 4, 0.4, 5, 0.3, 0.1, 0.1, 2_500_000)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(demo_model_directory())


# ---- ids ----


@pytest.mark.parametrize("text", ["1,2,3", "1 2 3", "1, 2,\n3\n", " 1\t2,,3 "])
def test_ids_are_separated_by_commas_or_blanks(text: str) -> None:
    assert parse_ids(text, "--ids") == [1, 2, 3]


@pytest.mark.parametrize(("text", "found"), [("1,two", "'two'"), ("1.5", "'1.5'"), ("", "no token id"), ("٣", "'٣'")])
def test_what_is_no_id_is_named(text: str, found: str) -> None:
    with pytest.raises(UsageError, match=f"^--ids: .*{found}"):
        parse_ids(text, "--ids")


def test_ids_come_from_text_and_npy_files(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("4, 5\n6\n")
    np.save(tmp_path / "ids.npy", np.array([7, 8], dtype=np.uint16))
    assert read_ids(str(tmp_path / "ids.txt"), "--ids") == [4, 5, 6]
    assert read_ids(str(tmp_path / "ids.npy"), "--ids") == [7, 8]


def test_bad_files_of_ids_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.npy' is neither a list of token ids like 1,2,3 nor a file"):
        read_ids(str(tmp_path / "none.npy"), "--ids")
    (tmp_path / "text.npy").write_text("1 2 3")
    with pytest.raises(UsageError, match=r"text\.npy: not a file of token ids"):
        read_ids(str(tmp_path / "text.npy"), "--ids")
    np.save(tmp_path / "floats.npy", np.array([1.0]))
    with pytest.raises(UsageError, match=r"expected a one-dimensional array of integers, found float64 \(1,\)"):
        read_ids(str(tmp_path / "floats.npy"), "--ids")


@pytest.mark.parametrize("token", [-1, 100])
def test_ids_outside_the_vocabulary_are_named(token: int) -> None:
    with pytest.raises(UsageError, match=f"token id {token} at position 1 is not in the vocabulary, 0 to 99"):
        require_ids([99, token], 100, "--ids")


# ---- .npy files ----


def test_rows_become_an_array_whatever_their_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    expected = np.random.default_rng(0).standard_normal((1234, 3)).astype(np.float32)
    with NpyRows(path, 3) as rows:
        rows.append(expected[:1])
        rows.append(expected[1:])
        assert not path.exists()
    found = np.load(path)
    assert found.dtype == np.float32
    assert (found == expected).all()
    assert [file.name for file in tmp_path.iterdir()] == ["rows.npy"]


def test_no_rows_are_an_empty_array(tmp_path: Path) -> None:
    with NpyRows(tmp_path / "rows.npy", 3):
        pass
    assert np.load(tmp_path / "rows.npy").shape == (0, 3)


def test_an_error_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    path.write_text("old")
    with pytest.raises(AssertionError), NpyRows(path, 3) as rows:
        rows.append(np.zeros((1, 4), np.float32))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be written \(No such file or directory\)"):
        require_writable(tmp_path / "no" / "rows.npy")
    with pytest.raises(UsageError, match="is a directory"):
        require_writable(tmp_path)
    require_writable(tmp_path / "rows.npy")
    assert list(tmp_path.iterdir()) == []


# ---- prompts ----


def test_a_prompt_file_loses_one_newline(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"Es war\r\neinmal\n\n")
    prompt = read_prompt(replace(RUN, prompt_file=str(path)), tokenizer, tokenizer.size, ALONE)
    assert prompt.text == "Es war\r\neinmal\n"
    assert tokenizer.decode(prompt.ids) == prompt.text


def test_a_prompt_that_is_not_utf8_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(UsageError, match=r"prompt\.txt: not valid UTF-8 at byte 3"):
        read_prompt(replace(RUN, prompt_file=str(path)), tokenizer, tokenizer.size, ALONE)


def test_an_empty_prompt_is_refused_where_no_token_begins_a_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_id is None
    with pytest.raises(UsageError, match="the prompt is empty"):
        read_prompt(replace(RUN, prompt=""), tokenizer, tokenizer.size, ALONE)


def test_prompt_ids_need_no_tokenizer() -> None:
    assert read_prompt(replace(RUN, prompt_ids="3,4"), None, 5, ALONE) == Prompt((3, 4), "")
    with pytest.raises(UsageError, match="--prompt-ids: token id 5 at position 1"):
        read_prompt(replace(RUN, prompt_ids="3,5"), None, 5, ALONE)


def test_a_tokenizer_of_another_model_is_noticed(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"tokenizer\.json does not fit this model"):
        read_prompt(replace(RUN, prompt="Once upon a time"), tokenizer, 3, ALONE)


def test_stdin_is_refused_where_it_never_ends(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"Open MPI.*use --prompt-file"):
        read_prompt(replace(RUN, prompt="-"), tokenizer, tokenizer.size, Launcher("openmpi", 0, 2, 2))


def test_flags_complete_the_models_advice() -> None:
    advised = GenerationConfig(frozenset(), temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05)
    expected = SamplingOptions(0.6, 20, 0.95, 0.0, seed=5, repetition_penalty=1.05)
    assert sampling_options(RUN, advised, None, 300) == expected
    assert sampling_options(replace(RUN, temperature=0.0), advised, None, 300).temperature == 0.0


def test_biases_and_breakers_become_ids(tokenizer: Tokenizer) -> None:
    advised = GenerationConfig(frozenset())
    options = replace(RUN, logit_bias=("5=+1.5", "9=-inf"), dry_multiplier=0.8, dry_breakers='["\\n", "Once upon"]')
    found = sampling_options(options, advised, tokenizer, tokenizer.size)
    assert found.logit_bias == ((5, 1.5), (9, -math.inf))
    texts = {tokenizer.decode(ids) for ids in found.dry_breakers}
    assert all("\n" in text or "Once upon" in text for text in texts)
    assert {"\n", "Once upon"} <= texts
    assert tuple(tokenizer.encode("Once upon")) in found.dry_breakers
    assert sampling_options(replace(options, dry_multiplier=0.0), advised, tokenizer, 9999).dry_breakers == frozenset()
    with pytest.raises(UsageError, match=r"--logit-bias: token id 9 at position 1 is not in the vocabulary, 0 to 8"):
        sampling_options(options, advised, tokenizer, 9)
    with pytest.raises(UsageError, match=r"no tokenizer: give --dry-breakers '\[\]'"):
        sampling_options(options, advised, None, 300)


# ---- models ----


def test_the_three_forms_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find_model(MODEL) == ModelSource(demo_model_directory(), WeightFormat.Q8)
    assert find_model(replace(MODEL, quant="f32")) == ModelSource(demo_model_directory(), WeightFormat.F32)
    assert find_model(replace(MODEL, model=str(tmp_path))) == ModelSource(tmp_path, WeightFormat.Q4)
    (tmp_path / "manifest.json").write_text("{}")
    assert find_model(replace(MODEL, model=str(tmp_path))) == ModelSource(tmp_path, None)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    for path, found in [(tmp_path / "none", "it does not exist"), (tmp_path, "it holds neither")]:
        with pytest.raises(UsageError, match=f"expected a store .* or a Hugging Face directory .*, but {found}"):
            find_model(replace(MODEL, model=str(path)))
    (tmp_path / ".progress.json").write_text("{}")
    with pytest.raises(UsageError, match="this store is incomplete"):
        find_model(replace(MODEL, model=str(tmp_path)))


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("DIST_MOE_CACHE", raising=False)
    assert cache_directory() == Path("/h/.cache/dist-moe")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_directory() == Path("/x/dist-moe")
    monkeypatch.setenv("DIST_MOE_CACHE", "/own")
    assert cache_directory() == Path("/own")


# ---- logs and output ----


def test_log_lines_carry_their_rank(tmp_path: Path) -> None:
    start_logging(0, str(tmp_path / "run.%r.log"), 3, "node7")
    logging.getLogger("dist_moe.some.part").info("mapped")
    logging.getLogger("dist_moe.some.part").debug("hidden")
    logging.getLogger("dist_moe").handlers[0].close()
    (line,) = (tmp_path / "run.3.log").read_text().splitlines()
    assert line.endswith("[rank 3 on node7] INFO mapped")


def test_a_log_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--log-file: .* cannot be written: No such file or directory"):
        start_logging(0, str(tmp_path / "no" / "run.log"), 0, "here")


def test_a_log_on_a_full_disk_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("dist_moe")
    start_logging(0, "/dev/full", 0, "here")
    for _ in range(3):
        logger.info("lost")
    logger.handlers[0].close()
    assert capsys.readouterr().err == (
        "dist-moe: /dev/full cannot be written (No space left on device): the log ends here\n"
    )


def printed(capsys: pytest.CaptureFixture[str], options: RunOptions, tokenizer: Tokenizer | None) -> tuple[str, str]:
    """Stdout and stderr of a run that continues "Hé" with "llo €" and an ordinary token that happens to end a text."""
    prompt = Prompt((1, 2), "Hé" if tokenizer else "")
    ids = [*tokenizer.encode("llo €"), *tokenizer.encode("!")] if tokenizer else [7, 8, 9]
    output, writer = Output(options, tokenizer), Writer(0, tokenizer and tokenizer.stream(), frozenset(ids[-1:]), ())
    output.begin(prompt)
    for token in ids[:-1]:
        output.piece(writer.push(token))
    output.piece(writer.finish(writer.push(ids[-1]), Completion(ids, "stop")))
    output.end(prompt, Result("", tuple(ids), "stop", Usage(2, len(ids))), STATISTICS)
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_text_follows_its_prompt_and_the_summary_goes_to_stderr(
    capsys: pytest.CaptureFixture[str], tokenizer: Tokenizer
) -> None:
    out, err = printed(capsys, RUN, tokenizer)
    assert out == "Héllo €\n"
    assert err.splitlines() == [
        "load 0.50 s | prefill 10 tokens, 100.0 tokens/s | decode 4 tokens, 10.0 tokens/s",
        "per token: compute 21.43 ms, waiting 7.14 ms, exchange 7.14 ms | sent 2.5 MB in all, 178.6 KB per token",
        "finish reason: stop",
    ]


def test_quiet_prints_the_new_text_alone(capsys: pytest.CaptureFixture[str], tokenizer: Tokenizer) -> None:
    assert printed(capsys, replace(RUN, quiet=True), tokenizer) == ("llo €\n", "")


def test_without_a_tokenizer_ids_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, replace(RUN, quiet=True), None) == ("7,8,9\n", "")


def test_json_is_one_object(capsys: pytest.CaptureFixture[str], tokenizer: Tokenizer) -> None:
    out, err = printed(capsys, replace(RUN, json=True), tokenizer)
    found = json.loads(out)
    assert (err, out.count("\n")) == ("", 1)
    assert found["text"] == "llo €"
    assert found["ids"][-1:] == tokenizer.encode("!")
    assert found["finish_reason"] == "stop"
    assert found["usage"]["prompt_tokens"] == 2
    assert found["usage"]["completion_tokens"] == len(found["ids"])
    assert found["timings"]["decode_tokens_per_s"] == 10.0


def test_json_without_a_tokenizer_has_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, replace(RUN, json=True), None)[0])
    assert found["text"] is None
    assert found["ids"] == [7, 8, 9]


def test_text_is_flushed_token_by_token(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    monkeypatch.setattr(click, "echo", lambda text="", **_: pieces.append(text))
    output, writer = Output(replace(RUN, quiet=True), tokenizer), Writer(0, tokenizer.stream(), frozenset(), ())
    for token in tokenizer.encode("one €"):
        output.piece(writer.push(token))
    assert "".join(pieces) == "one €"
    assert all("�" not in piece and piece for piece in pieces)


@pytest.mark.parametrize(
    ("written", "text"), [(r"\n\tx", "\n\tx"), (r"\\n", r"\n"), (r"a\bc", r"a\bc"), ("a\nb", "a\nb")]
)
def test_escapes_stand_for_what_shells_make_hard_to_write(written: str, text: str) -> None:
    assert unescape(written) == text
