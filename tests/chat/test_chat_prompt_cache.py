"""`dist-moe chat --prompt-cache`: a conversation that goes on in another job does not begin anew."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from helpers import launching

CHAT = (sys.executable, "-m", "dist_moe", "chat", "--threads", "1", "--temperature", "0", "-n", "8")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path_factory.getbasetemp() / "chat-cache"))


def chat(lines: str, directory: Path, *arguments: object) -> launching.Finished:
    path = directory / "lines"
    path.write_text(lines)
    with path.open() as file:
        return launching.run(*CHAT, *map(str, arguments), stdin=file.fileno())


def reused(done: launching.Finished) -> int:
    """Of the last answer, as /stats says."""
    assert done.code == 0, done.output
    return int(re.findall(r"(\d+) reused", done.stdout + done.stderr)[-1])


def test_a_conversation_goes_on_where_it_was(tmp_path: Path) -> None:
    cache, saved = ("--prompt-cache", tmp_path / "p"), tmp_path / "talk.json"
    first = chat(f"Tell me a story about a cat\n/save {saved}\n", tmp_path, *cache, "--ranks", 3)
    assert first.code == 0, first.output
    again = ("--load", saved)
    fresh = chat("And then?\n/stats\n", tmp_path, *again)
    resumed = chat("And then?\n/stats\n", tmp_path, *again, *cache, "--prompt-cache-ro", "--ranks", 2)
    assert resumed.stdout.splitlines()[0] == fresh.stdout.splitlines()[0]
    assert (reused(fresh), reused(resumed) > 10) == (0, True), resumed.output
    before = (tmp_path / "p").read_bytes()
    assert reused(chat("And then?\n/stats\n", tmp_path, *again, *cache)) == reused(resumed)
    assert (tmp_path / "p").stat().st_size > len(before)


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    cache = ("--prompt-cache", tmp_path / "p")
    assert chat("Tell me a long, long story about a cat. " * 4 + "\n", tmp_path, *cache).code == 0
    for more, words in (
        (("--kv", "q8"), "was saved with KV format f16, but here it is q8"),
        (("--ctx", "30"), "more than the context of 30: raise --ctx"),
        (("--rope-scaling", "yarn:2"), "was saved with rotary settings plain"),
    ):
        done = chat("Hello\n", tmp_path, *cache, *more)
        assert done.code == 2, done.output
        assert words in done.stderr, done.output
