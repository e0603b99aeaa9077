"""What is ignored is said: unknown variables of the environment, end tokens outside the vocabulary, a wrong ISA."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import pytest

from dist_moe.cli.environment import environment_warnings
from dist_moe.cli.main import execute
from dist_moe.cli.summary import as_json
from dist_moe.cli.version import version_lines
from dist_moe.engine.requests.pieces import Result, Usage
from dist_moe.engine.requests.questions import known_stop_ids
from dist_moe.engine.watch.statistics import EngineStatistics

OPTIONS = ("DIST_MOE_THREADS", "DIST_MOE_MAX_TOKENS")


@pytest.mark.parametrize(
    ("name", "value", "warning"),
    [
        ("DIST_MOE_MAXTOKENS", "4", "DIST_MOE_MAXTOKENS is unknown and ignored: did you mean DIST_MOE_MAX_TOKENS?"),
        ("DIST_MOE_THREAD", "4", "did you mean DIST_MOE_THREADS?"),
        ("DIST_MOE_CAHCE", "/x", "did you mean DIST_MOE_CACHE?"),
        ("DIST_MOE_QQQQQQQQ", "1", "DIST_MOE_QQQQQQQQ is unknown and ignored"),
        ("DIST_MOE_SHARED_MEMORY", "abc", "DIST_MOE_SHARED_MEMORY=abc is ignored: expected 0 or 1"),
    ],
)
def test_a_variable_without_effect_is_named(name: str, value: str, warning: str) -> None:
    (found,) = environment_warnings({name: value, "HOME": "/"}, OPTIONS)
    assert warning in found


def test_known_variables_are_silent() -> None:
    known = {name: "1" for name in (*OPTIONS, "DIST_MOE_YIELD", "DIST_MOE_ISA", "DIST_MOE_CACHE", "DIST_MOE_TEST_X")}
    assert environment_warnings(known | {"DIST_MOE_SHARED_MEMORY": ""}, OPTIONS) == []


@pytest.mark.parametrize(
    ("rank", "command"),
    [
        (0, ("run", "--print-config")),
        (1, ("run", "--print-config")),
        (0, ("shard", "--help")),
        (0, ("inspect", "--help")),
        (0, ("doctor", "--help")),
    ],
)
def test_the_first_rank_warns_once(rank: int, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DIST_MOE_")]:
        monkeypatch.delenv(name)
    for name, value in {"PMI_SIZE": "2", "PMI_RANK": str(rank), "DIST_MOE_IDS": "1", "DIST_MOE_SEDE": "3"}.items():
        monkeypatch.setenv(name, value)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        execute(command)
    expected = (
        "dist-moe: warning: the environment variable DIST_MOE_SEDE is unknown and ignored: did you mean DIST_MOE_SEED?"
    )
    assert errors.getvalue().splitlines() == ([expected] if rank == 0 else [])


def test_end_tokens_outside_the_vocabulary_are_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert known_stop_ids(frozenset({3, 99999, -1}), None, 100) == {3}
    assert known_stop_ids(frozenset({3, 99}), None, 100) == {3, 99}
    ((level, message),) = ((record.levelname, record.getMessage()) for record in caplog.records)
    assert level == "WARNING"
    assert "eos_token_id -1, 99999 of the model's files is ignored: its vocabulary is 0 to 99" in message


def test_the_version_does_not_choose_what_a_run_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_MOE_ISA", "bogus")
    (line,) = [line for line in version_lines() if line.startswith("kernels:")]
    assert line.endswith("DIST_MOE_ISA=bogus is none of them and will be refused")
    monkeypatch.setenv("DIST_MOE_ISA", "portable")
    assert any(line.endswith("chosen portable") for line in version_lines())


def test_timings_have_six_digits() -> None:
    statistics = EngineStatistics(1 / 3, 10, 1 / 7, 3, 2 / 3, 5, 0.3, 0.1, 0.1, 12_345_678)
    timings = as_json(Result("", (2,), "length", Usage(1, 1)), None, statistics)["timings"]
    assert (timings["load_s"], timings["prefill_tokens_per_s"], timings["sent_bytes"]) == (0.333333, 70.0, 12_345_678)
    assert isinstance(timings["sent_bytes"], int)


def test_a_config_file_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("seed = 7\n", encoding="utf-8-sig")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        execute(["run", "--config", str(config), "--print-config"])
    assert f"seed = 7  # config {config}" in output.getvalue().splitlines()
