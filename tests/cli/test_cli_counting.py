"""How far a long calculation is, on stderr: lines now and then, and none of a quick one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest

from dist_moe.cli.counting import CountProgress


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[bool, list[float]], str]:
    """What is written for a calculation whose steps end at these seconds."""

    def told(on_terminal: bool, seconds: list[float]) -> str:
        clock = iter([0.0, *seconds])
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
        monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
        progress = CountProgress("placing layer")
        for done in range(1, len(seconds) + 1):
            progress(done, len(seconds))
        return capsys.readouterr().err

    return told


def test_a_quick_one_is_silent(told: Callable[[bool, list[float]], str]) -> None:
    assert told(False, [0.1, 1.9, 3.0]) == ""
    assert told(True, [0.1, 0.2, 1.9]) == ""


def test_lines_are_seconds_apart(told: Callable[[bool, list[float]], str]) -> None:
    expected = "placing layer 2 of 6\nplacing layer 5 of 6\n"
    assert told(False, [1.0, 2.5, 4.0, 7.0, 7.6, 20.0]) == expected


def test_a_terminal_has_one_line(told: Callable[[bool, list[float]], str]) -> None:
    expected = "\rplacing layer 2 of 4\rplacing layer 4 of 4\n"
    assert told(True, [1.0, 2.5, 2.55, 2.56]) == expected
