"""The commands for real: alone and under mpirun, on a model without a tokenizer and on the bundled demo."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers import launching

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "base"
BARE = ("-m", str(GOLDEN), "--quant", "f32")
PROGRAM = (sys.executable, "-m", "dist_moe")

MpiRun = Callable[..., launching.Finished]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"DIST_MOE_CACHE": str(tmp_path_factory.mktemp("cache")), "DIST_MOE_THREADS": "1"}


@pytest.fixture
def alone(environment: dict[str, str]) -> Callable[..., launching.Finished]:
    """Run a command without a launcher; it must succeed."""

    def run(*arguments: str) -> launching.Finished:
        done = launching.run(*PROGRAM, *arguments, env=environment)
        assert done.code == 0, done.output
        return done

    return run


def test_a_model_without_a_tokenizer_takes_and_gives_ids(alone: MpiRun, tmp_path: Path) -> None:
    prompt = ("run", *BARE, "--prompt-ids", "1,2,3", "-n", "5", "--temperature", "0", "--ignore-eos")
    done = alone(*prompt, "--quiet", "--logits", str(tmp_path / "run.npy"))
    ids = [int(token) for token in done.stdout.split(",")]
    found = json.loads(alone(*prompt, "--json").stdout)
    assert (found["ids"], found["text"], found["finish_reason"]) == (ids, None, "length")
    logits_TV = np.load(tmp_path / "run.npy")
    assert logits_TV.dtype == np.float32
    assert logits_TV.argmax(axis=1).tolist() == ids
    texts = [str(token) for token in [1, 2, 3, *ids[:-1]]]
    alone("logits", *BARE, "--ids", ",".join(texts), "-o", str(tmp_path / "all.npy"), "--prefill-chunk", "3")
    assert np.load(tmp_path / "all.npy")[2:].tobytes() == logits_TV.tobytes()


def test_a_model_without_a_tokenizer_refuses_text(environment: dict[str, str]) -> None:
    done = launching.run(*PROGRAM, "run", *BARE, "-p", "Once", env=environment)
    assert done.code == 2, done.output
    assert "has no tokenizer.json" in done.stderr


def test_text_from_flag_file_and_stdin_is_the_same(alone: MpiRun, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Once upon a time\n")
    rest = ("-n", "12", "--temperature", "0.8", "--seed", "7", "--quiet")
    text = alone("run", "-p", "Once upon a time", *rest).stdout
    assert alone("run", "--prompt-file", str(tmp_path / "prompt.txt"), *rest).stdout == text
    with (tmp_path / "prompt.txt").open() as stdin:
        done = launching.run(*PROGRAM, "run", "-p", "-", *rest, env=environment, stdin=stdin.fileno())
    assert done.stdout == text
    found = json.loads(alone("run", "-p", "Once upon a time", *rest[:-1], "--json").stdout)
    assert found["text"].rstrip("\n") == text.rstrip("\n")


@pytest.mark.parametrize(("words", "code"), [(("run", "-p", "-"), 2), (("chat",), 0)])
def test_a_closed_stdin_is_an_empty_one(words: tuple[str, ...], code: int, environment: dict[str, str]) -> None:
    done = launching.run("sh", "-c", 'exec "$@" <&-', "sh", *PROGRAM, *words, env=environment)
    assert done.code == code, done.output
    assert "internal error" not in done.output


def test_the_whole_text_and_a_summary_are_shown(alone: MpiRun) -> None:
    done = alone("run", "-p", "Once upon a time", "-n", "3")
    assert done.stdout.startswith("Once upon a time")
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["load", "per", "finish"]


def test_stop_strings_are_not_printed(alone: MpiRun, environment: dict[str, str]) -> None:
    rest = ("run", "-p", "Once upon a time", "-n", "24", "--temperature", "0")
    whole = json.loads(alone(*rest, "--json").stdout)["text"]
    stop = whole[10:16]
    found = json.loads(alone(*rest, "--json", "--stop", "\\n\\nnever", "--stop", stop).stdout)
    assert found["text"] == whole[: whole.index(stop)]
    assert (found["finish_reason"], found["stop"]) == ("stop_string", stop)
    shown = alone(*rest, "--stop", stop)
    assert shown.stdout == "Once upon a time" + found["text"] + "\n"
    assert shown.stderr.splitlines()[-1] == f"finish reason: stop_string {json.dumps(stop)}"
    done = launching.run(*PROGRAM, "run", *BARE, "--prompt-ids", "1", "--stop", "a", env=environment)
    assert (done.code, done.stdout) == (2, ""), done.output
    assert "--stop is about text, but this model has no tokenizer" in done.stderr


def test_the_context_s_end_is_a_finish_reason(alone: MpiRun) -> None:
    found = json.loads(alone("run", "-p", "Once", "--ctx", "5", "--ignore-eos", "--json").stdout)
    assert (found["finish_reason"], found["usage"]["total_tokens"]) == ("context", 5)


def test_ranks_print_once_and_the_same(mpirun: MpiRun, alone: MpiRun, tmp_path: Path) -> None:
    # A cold cache: both ranks start at once, one packs the model.
    cold = {"DIST_MOE_CACHE": str(tmp_path), "DIST_MOE_THREADS": "1"}
    command = ("run", "-p", "Once upon a time", "-n", "6", "--quiet", "--log-file", str(tmp_path / "log.%r"))
    done = mpirun(2, *PROGRAM, *command, env=cold)
    assert (done.code, done.stderr) == (0, ""), done.output
    assert done.stdout == alone(*command).stdout
    assert "[rank 1 on " in (tmp_path / "log.1").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "-p", "a", "--kv", "f8"), "--kv: expected f32, f16 or q8"),
        (("run",), "there is nothing to continue"),
        (("run", "-m", "nowhere", "-p", "a"), "-m nowhere: expected a store"),
        (("run", "-p", "a", "--logits", "nowhere/x.npy"), "nowhere/x.npy: cannot be written"),
        (("run", *BARE, "--prompt-ids", "1,131"), "token id 131 at position 1 is not in the vocabulary, 0 to 130"),
        (("run", *BARE, "--prompt-ids", ",".join(["1"] * 513)), "the prompt has 513 tokens, but the context has 512"),
        (("logits", *BARE, "--ids", "nowhere.npy", "-o", "x.npy"), "neither a list of token ids"),
    ],
)
def test_bad_input_is_one_line_under_mpirun(
    mpirun: MpiRun, environment: dict[str, str], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = mpirun(4, *PROGRAM, *arguments, env=environment, cwd=tmp_path)
    own = [line for line in done.stderr.splitlines() if line.startswith("dist-moe: ")]
    assert (done.code, done.stdout, len(own)) == (2, "", 1), done.output
    assert own[0].startswith("dist-moe: error: ")
    assert message in own[0]
    assert list(tmp_path.iterdir()) == []


def test_the_help_and_the_version_are_printed_once_under_mpirun(mpirun: MpiRun) -> None:
    assert mpirun(3, *PROGRAM, "run", "--help").stdout.count("--prompt-file FILE") == 1
    assert mpirun(3, *PROGRAM, "--version").stdout.count("dist-moe ") == 1


def test_a_reader_that_leaves_ends_the_run_quietly(environment: dict[str, str]) -> None:
    command = [*PROGRAM, "run", "-p", "Once upon a time", "-n", "2000", "--ignore-eos"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=launching.child_environment(environment)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


def test_a_flipped_bit_is_found_before_the_run(environment: dict[str, str], alone: MpiRun, tmp_path: Path) -> None:
    store = tmp_path / "store"
    alone("shard", str(GOLDEN), "-o", str(store), "--quant", "q8", "--quiet")
    shard = next(store.glob("shard-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-4096] ^= 1
    shard.write_bytes(data)
    done = launching.run(*PROGRAM, "run", "-m", str(store), "--prompt-ids", "1", "--check", "full", env=environment)
    assert done.code == 2, done.output
    assert str(shard) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_store_is_not_packed_again_with_another_format(
    alone: MpiRun, environment: dict[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    alone("shard", str(GOLDEN), "-o", str(store), "--quant", "bf16", "--quiet")
    shutil.copytree(store, tmp_path / "copy")
    alone("run", "-m", str(tmp_path / "copy"), "--quant", "bf16", "--prompt-ids", "1", "-n", "1")
    done = launching.run(*PROGRAM, "run", "-m", str(store), "--quant", "q4", "--prompt-ids", "1", env=environment)
    assert done.code == 2
    assert "is a store of bf16 weights" in done.stderr
