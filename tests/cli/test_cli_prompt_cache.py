"""`run --prompt-cache`: from one rank count to another, what is written when, and every refusal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import launching

PROMPT = "Once upon a time there was a little girl named Lily. She liked to play outside in the sun."
Run = Callable[..., launching.Finished]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"DIST_MOE_CACHE": str(tmp_path_factory.mktemp("cache")), "DIST_MOE_THREADS": "1"}


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """run("--json", ..., ranks=2, prompt=...): `dist-moe run` on the demo model."""

    def run(*arguments: object, ranks: int = 1, prompt: str = PROMPT) -> launching.Finished:
        program = (sys.executable, "-m", "dist_moe", "run", "-p", prompt, "-n", "12", "--ignore-eos")
        command = (*program, "--temperature", "0.7", *map(str, arguments))
        if ranks == 1:
            return launching.run(*command, env=environment)
        return launching.mpirun(ranks, *command, env=environment)

    return run


def result(done: launching.Finished) -> dict[str, Any]:
    assert done.code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kv", ["f16", "q8"])
def test_a_prompt_saved_by_three_ranks_serves_any_number(run: Run, tmp_path: Path, kv: str) -> None:
    cache = ("--prompt-cache", tmp_path / "p", "--kv", kv, "--json")
    first = result(run(*cache, ranks=3))
    tokens = first["usage"]["prompt_tokens"]
    assert first["usage"]["reused_tokens"] == 0
    saved = (tmp_path / "p").read_bytes()
    for ranks in (1, 2, 4):
        again = result(run(*cache, ranks=ranks))
        assert (again["ids"], again["usage"]["reused_tokens"]) == (first["ids"], tokens - 1)
        assert (again["timings"]["reused_tokens"], again["timings"]["prefill_tokens"]) == (tokens - 1, 1)
    assert (tmp_path / "p").read_bytes() == saved
    longer = result(run(*cache, prompt=PROMPT + " One day", ranks=2))
    assert longer["usage"]["reused_tokens"] == tokens
    assert longer["ids"] == result(run("--json", "--kv", kv, prompt=PROMPT + " One day"))["ids"]
    assert (tmp_path / "p").read_bytes() != saved


def test_the_answer_is_saved_only_if_wanted(run: Run, tmp_path: Path) -> None:
    cache = ("--prompt-cache", tmp_path / "p")
    first = result(run(*cache, "--prompt-cache-all", "--json"))
    longer = PROMPT + first["text"]
    tokens = first["usage"]["prompt_tokens"]
    reused = result(run(*cache, "--prompt-cache-ro", "--json", prompt=longer))["usage"]["reused_tokens"]
    assert tokens < reused <= tokens + 11
    before = (tmp_path / "p").read_bytes()
    assert run(*cache).code == 0, "a shorter prompt is in the file already"
    assert (tmp_path / "p").read_bytes() == before
    done = run(*cache, prompt=longer)
    assert f"({reused} reused)" in done.stderr, done.output


def test_read_only_writes_nothing(run: Run, tmp_path: Path) -> None:
    cache = ("--prompt-cache", tmp_path / "p")
    assert run(*cache, "--quiet").code == 0
    before = (tmp_path / "p").read_bytes()
    tmp_path.chmod(0o500)
    other = result(run(*cache, "--prompt-cache-ro", "--json", prompt="The cat"))
    tmp_path.chmod(0o700)
    assert other["usage"]["reused_tokens"] == 0
    assert (tmp_path / "p").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_every_refusal_is_one_line_before_any_weight_is_read(run: Run, tmp_path: Path) -> None:
    cache = tmp_path / "p"
    assert run("--prompt-cache", cache).code == 0
    damaged = tmp_path / "damaged"
    damaged.write_bytes(cache.read_bytes()[:-9] + b"123456789")
    short = tmp_path / "short"
    short.write_bytes(cache.read_bytes()[:-9])
    other = tmp_path / "other"
    other.write_text("no such file")
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("--prompt-cache", cache, "--kv", "q8"), 2, "was saved with KV format f16, but here it is q8"),
        (("--prompt-cache", cache, "--quant", "q4"), 1, "was saved with weights q8"),
        (("--prompt-cache", damaged), 1, "is damaged: its checksum"),
        (("--prompt-cache", short), 1, "truncated: expected at least"),
        (("--prompt-cache", other), 1, "its header is damaged"),
        (("--prompt-cache", tmp_path), 1, "is a directory: name a file"),
        (("--prompt-cache", tmp_path / "none" / "p"), 1, "cannot be written (No such file or directory)"),
        (("--prompt-cache", tmp_path / "none", "--prompt-cache-ro"), 1, "there is no such file"),
        (("--prompt-cache-ro",), 1, "--prompt-cache-ro needs --prompt-cache FILE"),
        (("--prompt-cache-all",), 1, "--prompt-cache-all needs --prompt-cache FILE"),
        (("--prompt-cache", cache, "--prompt-cache-ro", "--prompt-cache-all"), 1, "exclude each other"),
    ]
    for arguments, ranks, words in cases:
        done = run(*arguments, ranks=ranks)
        assert (done.code, done.stdout) == (2, ""), done.output
        assert words in done.stderr, done.output
        assert done.stderr.count("dist-moe: error:") == 1, done.output


def test_a_disk_that_is_full_leaves_the_old_file(run: Run, environment: dict[str, str], tmp_path: Path) -> None:
    cache = tmp_path / "p"
    assert run("--prompt-cache", cache).code == 0
    before = cache.read_bytes()
    program = (sys.executable, "-m", "dist_moe", "run", "-p", PROMPT + " One day", "-n", "3", "--prompt-cache", cache)
    limited = ("bash", "-c", 'ulimit -f 8; trap "" XFSZ; exec "$@"', "bash", *map(str, program), "--threads", "1")
    done = launching.run(*limited, env=environment)
    assert done.code == 2, done.output
    assert "cannot be written (File too large): make room" in done.stderr, done.output
    assert cache.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
