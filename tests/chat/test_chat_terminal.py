"""`dist-moe chat` as its user sees it, in a pty: typing, streaming, Ctrl-C, commands, and every way to end."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
from pathlib import Path

import pytest

from helpers.terminal_chat import TerminalChat

QUICK = ("--temperature", "1", "--seed", "7", "-n", "12")
SLOW_STEP_S = 0.05
STORY = "Tell me a story about a fox."


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """History, packed model and sockets of all these chats."""
    return tmp_path_factory.mktemp("home")


def answer_in(printed: str) -> str:
    """The answer in what followed a typed line, up to the remark about its end."""
    return printed.split("(cut after")[0].split("\n", 1)[1].strip()


@pytest.mark.parametrize("ranks", [1, 4])
def test_commands_and_the_end_of_input(home: Path, tmp_path: Path, ranks: int) -> None:
    saved = tmp_path / "talk.json"
    with TerminalChat(ranks, *QUICK, home=home) as chat:
        assert f"{ranks} rank" in chat.wait_until_asked()
        first = answer_in(chat.ask(STORY))
        again = chat.ask("/retry")
        assert "seed 8" in again
        assert answer_in(again.split("seed 8")[1]) != first
        assert "saved 1 turn in" in chat.ask(f"/save {saved}")
        assert "taken back: Tell me a story about a fox." in chat.ask("/undo")
        assert "there is no message to take back" in chat.ask("/undo")
        assert answer_in(chat.ask(STORY)) == first
        assert "loaded 1 turn from" in chat.ask(f"/load {saved}")
        assert "unknown command /sav (did you mean /save?)" in chat.ask("/sav")
        assert "answer 12 tokens" in chat.ask("/stats")
        chat.child.sendeof()
        assert chat.end() == (0, [])
    roles = [message["role"] for message in json.loads(saved.read_text())["messages"]]
    assert roles == ["user", "assistant"]
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    history = home / "state" / "dist-moe" / "chat_history"
    assert STORY in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert not list(home.glob("dist-moe-*"))


@pytest.mark.parametrize("ranks", [1, 4])
def test_control_c_stops_the_answer_and_not_the_job(home: Path, ranks: int) -> None:
    with TerminalChat(ranks, "--temperature", "0", home=home, step_s=SLOW_STEP_S) as chat:
        chat.wait_until_asked()
        ranks_before = chat.back_ends()
        assert len(ranks_before) == ranks
        chat.type(STORY)
        chat.wait_for("Once ")  # it streams: the whole story takes seconds
        chat.control_c()
        stopped = re.search(r"\(stopped after (\d+) tokens\)", chat.wait_until_asked())
        assert stopped is not None
        assert 0 < int(stopped[1]) < 60
        chat.control_c()
        chat.wait_for("Ctrl-C again or Ctrl-D leaves")
        chat.wait_until_asked()
        assert chat.back_ends() == ranks_before
        assert "interrupted" in chat.ask("/stats")
        chat.control_c()
        chat.wait_until_asked()
        chat.control_c()
        assert chat.end() == (0, [])


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP])
def test_a_front_end_that_dies_takes_the_job_along(home: Path, ranks: int, how: signal.Signals) -> None:
    with TerminalChat(ranks, "--temperature", "0", home=home, step_s=SLOW_STEP_S) as chat:
        chat.wait_until_asked()
        chat.type(STORY)
        chat.wait_for("Once ")
        chat.hit(how)
        assert chat.end() == (None, [])
    assert not list(home.glob("dist-moe-*"))


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_front_end_killed_while_it_waits_or_loads(home: Path, ranks: int) -> None:
    with TerminalChat(ranks, home=home) as chat:
        chat.wait_until_asked()
        chat.hit(signal.SIGKILL)
        assert chat.end() == (None, [])
    with TerminalChat(ranks, home=home, DIST_MOE_TEST_LOAD_S="600") as chat:
        chat.wait_for("loading slowly")
        chat.hit(signal.SIGKILL)
        assert chat.end() == (None, [])


@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_that_cannot_leave_are_killed_with_their_front_end(home: Path, ranks: int) -> None:
    with TerminalChat(ranks, home=home) as chat:
        chat.wait_until_asked()
        for rank in chat.back_ends():
            os.kill(rank, signal.SIGSTOP)
        chat.hit(signal.SIGKILL)
        assert chat.end() == (None, [])


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_job_that_dies_is_told_in_one_line(home: Path, ranks: int) -> None:
    with TerminalChat(ranks, home=home) as chat:
        chat.wait_until_asked()
        os.kill(chat.back_ends()[0], signal.SIGKILL)
        chat.wait_for("dist-moe: error: the job ")
        code, left = chat.end()
    assert code not in (0, 1, None)
    assert left == []


@pytest.mark.parametrize("ranks", [1, 4])
def test_control_c_while_the_model_loads_leaves(home: Path, ranks: int) -> None:
    with TerminalChat(ranks, home=home, DIST_MOE_TEST_LOAD_S="600") as chat:
        chat.wait_for("loading slowly")
        chat.control_c()
        chat.wait_for("dist-moe: interrupted")
        assert "TERMINATION" not in chat.child.before
        assert chat.end() == (130, [])


def test_several_lines_and_control_c_on_a_line_with_text(home: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    with TerminalChat(1, *QUICK, home=home) as chat:
        chat.wait_until_asked()
        chat.child.send("gone")
        chat.wait_for("gone")
        chat.control_c()
        chat.wait_until_asked()
        chat.child.send("one\\\rtwo\x1b\rthree")
        chat.wait_for("three")
        chat.ask("")
        chat.ask(f"/save {saved}")
        chat.type("/exit")
        assert chat.end() == (0, [])
    assert json.loads(saved.read_text())["messages"][0] == {"role": "user", "content": "one\ntwo\nthree"}


def test_no_colour_and_hidden_thinking(home: Path) -> None:
    with TerminalChat(1, *QUICK, "--hide-thinking", home=home, NO_COLOR="1") as chat:
        chat.wait_until_asked()
        assert "/help lists the commands" in chat.child.before
        assert "\x1b[2m" not in chat.child.before
        chat.child.sendeof()
        assert chat.end() == (0, [])
