"""What a cold start shows on stderr."""

from __future__ import annotations

import io

import pytest

from dist_moe.cli import reading
from dist_moe.cli.reading import ReadingProgress


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(reading, "time", made)
    return made


def tell(clock: Clock, progress: ReadingProgress, *figures: tuple[float, int]) -> None:
    """(second, gigabytes done) of 8."""
    for second, gigabytes in figures:
        clock.now_s = 100.0 + second
        progress(gigabytes * 10**9, 8 * 10**9)


def test_a_quick_start_is_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    tell(clock, ReadingProgress(1), (0.0, 1), (0.5, 5), (0.99, 8))
    assert capsys.readouterr() == ("", "")


def test_lines_without_a_terminal(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    tell(clock, ReadingProgress(1), (0.0, 0), (0.9, 1), (1.0, 2), (3.0, 4), (5.9, 5), (6.0, 6), (6.5, 7), (7.0, 8))
    assert capsys.readouterr().err.splitlines() == [
        "reading weights: 2.00 of 8.00 GB, 2.00 GB/s, 3 s left",
        "reading weights: 6.00 of 8.00 GB, 1.00 GB/s, 2 s left",
        "reading weights: 8.00 of 8.00 GB, 1.14 GB/s",
    ]


def test_of_several_ranks_it_is_rank_0_that_is_shown(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    tell(clock, ReadingProgress(4), (0.0, 0), (2.0, 8))
    assert capsys.readouterr().err == "reading weights (rank 0 of 4): 8.00 of 8.00 GB, 4.00 GB/s\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line_on_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    tell(clock, ReadingProgress(1), (0.0, 0), (0.9, 1), (1.0, 2), (2.0, 6), (4.0, 8))
    text = terminal.getvalue()
    assert text.count("\n") == text.endswith("\n") == 1
    assert "0.9" not in text
    assert "2.00 of 8.00 GB, 2.00 GB/s, 3 s left" in text
    assert "8.00 of 8.00 GB, 2.00 GB/s" in text
