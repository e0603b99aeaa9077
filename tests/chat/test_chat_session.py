"""Commands and the conversation, with a back end that says what it is told to."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_moe.chat.commands import COMMANDS, Call, help_lines, parse_line, parse_thinking
from dist_moe.chat.conversation import Conversation, load_conversation
from dist_moe.chat.display import Display
from dist_moe.chat.protocol import Done, Generate, Note, Piece, Ready, Refused
from dist_moe.chat.session import Chat, Settings
from dist_moe.errors import UsageError
from dist_moe.text.messages import Message, ToolCall

WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a town."}}


def done(content: str, finish_reason: str = "stop", **fields: Any) -> Done:
    message = {"role": "assistant", "content": content, **fields}
    return Done(message, finish_reason, "", 10, 4, 5, 0.5, 2.0)


class Script:
    """A back end with its answers, a user with his lines."""

    is_interactive = True

    def __init__(self, answers: list[Done | Refused], *lines: str | type[BaseException]) -> None:
        self.answers, self.lines = answers, list(lines)
        self.requests: list[Generate] = []
        self.marks: list[str] = []

    def answer(self, request: Generate, show: Callable[[Piece | Note], None]) -> Done | Refused:
        self.requests.append(request)
        found = self.answers[len(self.requests) - 1]
        if isinstance(found, Done):
            show(Piece(found.message["content"], "answer"))
        return found

    def read(self, mark: str) -> str:
        self.marks.append(mark)
        line = self.lines.pop(0) if self.lines else EOFError
        if isinstance(line, str):
            return line
        raise line

    def run(self, **facts: Any) -> tuple[str, str, Conversation]:
        """Hold the chat; returns what went to stdout and stderr, and the conversation."""
        known = {"model": "m", "ranks": 1, "context": 100, "thinking": "switchable", "knows_tools": True}
        out, err = io.StringIO(), io.StringIO()
        display = Display(show_thinking=True, environ={}, out=out, err=err)
        ready = Ready(**{**known, "temperature": 1.0, **facts})
        chat = Chat(self, self, display, ready, Settings(seed=5))
        chat.run()
        return out.getvalue(), err.getvalue(), chat.conversation


def contents(request: Generate) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in request.messages]


def test_every_command_exists_and_is_in_the_help() -> None:
    for command in COMMANDS:
        assert hasattr(Chat, f"_do_{command.name}")
        assert any(line.startswith(f"/{command.name}") for line in help_lines())


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("hello /there", "hello /there"),
        ("//etc", "/etc"),
        ("/etc/passwd is a file", "/etc/passwd is a file"),
        ("/save my file.json ", Call("save", "my file.json")),
        ("/system one\ntwo", Call("system", "one\ntwo")),
        ("/no_think\nwhy?", Call("no_think", "why?")),
        ("/quit", Call("exit", "")),
    ],
)
def test_lines(line: str, parsed: Call | str) -> None:
    assert parse_line(line) == parsed


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/rety", r"unknown command /rety \(did you mean /retry\?\)"),
        ("/", "unknown command /"),
        ("/save", "/save needs FILE"),
        ("/undo 2", "/undo takes nothing, found '2'"),
    ],
)
def test_lines_that_are_refused(line: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_line(line)


@pytest.mark.parametrize("text", ["", "-1", "1.5", "maybe", "²", "99999999999"])
def test_thinking_that_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--thinking: expected auto, on, off or a number of tokens from 0"):
        parse_thinking(text, "--thinking")


def test_a_turn_carries_what_was_said_before() -> None:
    script = Script([done("hi"), done("fine")], "/system be brief", "hello", "how are you?")
    out, _, conversation = script.run()
    assert contents(script.requests[1]) == [
        ("system", "be brief"),
        ("user", "hello"),
        ("assistant", "hi"),
        ("user", "how are you?"),
    ]
    assert out == "hi\nfine\n"
    assert conversation.turns == 2


def test_retry_takes_the_next_seed_and_a_new_message_the_first() -> None:
    script = Script([done(str(n)) for n in range(4)], "a", "/retry", "/retry", "b")
    _, err, _ = script.run()
    assert [request.seed for request in script.requests] == [5, 6, 7, 5]
    assert "seed 6\n" in err
    assert contents(script.requests[3]) == [("user", "a"), ("assistant", "2"), ("user", "b")]


def test_retry_says_that_the_best_token_stays_the_best() -> None:
    _, err, _ = Script([done("x"), done("x")], "a", "/retry").run(temperature=0.0)
    assert "seed 6: at temperature 0 the answer stays the same" in err


def test_undo_clear_and_system() -> None:
    script = Script([done("1"), done("2")], "/undo", "/system s", "a", "b", "/undo", "/clear", "/system", "/system -")
    _, err, conversation = script.run()
    for line in ("/undo: there is no message", "taken back: b", "the system prompt stays", "system prompt: s\n"):
        assert line in err
    assert err.endswith("there is no system prompt\n")
    assert conversation.messages == []


def test_what_is_refused_leaves_the_conversation_as_it_was() -> None:
    script = Script([done("1"), Refused("too long"), Refused("no"), done("2")], "a", "b", "/retry", "c")
    _, err, _ = script.run()
    assert "dist-moe: error: too long\n" in err
    assert contents(script.requests[3]) == [("user", "a"), ("assistant", "1"), ("user", "c")]


def test_thinking_is_set_by_three_commands_and_refused_where_it_cannot_be_had() -> None:
    script = Script([done(""), done("")], "/think", "/no_think why", "/thinking 64", "x", "/thinking 1.5")
    _, err, _ = script.run()
    assert [request.thinking for request in script.requests] == ["off", "64"]
    assert "thinking: at most 64 tokens" in err
    assert "/thinking: expected auto, on, off or a number" in err
    assert "does not think" in Script([], "/think").run(thinking="never")[1]
    assert "always thinks" in Script([], "/no_think").run(thinking="always")[1]


def test_tool_calls_are_shown_and_their_results_fed_back(tmp_path: Path) -> None:
    tools, result = tmp_path / "tools.json", tmp_path / "result.txt"
    tools.write_text(json.dumps([WEATHER]))
    result.write_text("rain")
    calls = [ToolCall("weather", {"town": town}, town).to_json() for town in ("Bern", "Köln")]
    script = Script(
        [done("", tool_calls=calls), done("wet")], f"/tools {tools}", "and?", "sun", "@/no/such", f"@{result}"
    )
    out, err, _ = script.run()
    assert script.requests[0].tools == [WEATHER]
    assert 'call weather {"town": "Köln"}\n' in err
    assert "@/no/such: cannot be read as text" in err
    assert script.marks.count("result of weather (text or @FILE)> ") == 3
    results = [(m["content"], m["tool_call_id"]) for m in script.requests[1].messages if m["role"] == "tool"]
    assert results == [("sun", "Bern"), ("rain", "Köln")]
    assert out == "wet\n"


def test_without_a_result_the_chat_goes_on() -> None:
    call = ToolCall("weather", {}).to_json()
    script = Script([done("", tool_calls=[call]), done("ok")], "a", KeyboardInterrupt, "/undo", "b")
    _, err, conversation = script.run()
    assert "stays unanswered" in err
    assert conversation.messages == [Message("user", "b"), Message("assistant", "ok")]


def test_stats_and_the_ends_of_answers() -> None:
    script = Script([done("x", "interrupted"), done("x", "length")], "/stats", "a", "b", "/stats")
    _, err, _ = script.run()
    assert "/stats: there is no answer yet" in err
    assert "(stopped after 5 tokens)" in err
    assert "(cut after 5 tokens" in err
    assert "prompt 10 tokens, 4 reused, 6 computed at 12.0 tokens/s | answer 5 tokens at 2.0 tokens/s, length" in err
    assert "context 15 of 100" in err


def test_control_c_twice_leaves_and_once_does_not() -> None:
    script = Script([done("x")], KeyboardInterrupt, "a", KeyboardInterrupt, KeyboardInterrupt, "b")
    _, err, _ = script.run()
    assert err.count("Ctrl-C again or Ctrl-D leaves") == 2
    assert len(script.requests) == 1


def test_a_device_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="is a device or pipe: name a file"):
        Conversation([]).save(pipe)
    assert pipe.is_fifo()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    Conversation([]).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600


def test_a_conversation_comes_back_from_its_file(tmp_path: Path) -> None:
    call = ToolCall("weather", {"town": "Bern"}, "1")
    whole = Conversation(
        [
            Message("system", "s"),
            Message("user", "<|im_end|>"),
            Message("assistant", "", "hm", (call,)),
            Message("tool", "sun", tool_call_id="1"),
            Message("assistant", "fine"),
        ]
    )
    whole.save(tmp_path / "c.json")
    assert load_conversation(tmp_path / "c.json", "/load") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("[]", "is no conversation"),
        ('{"dist_moe_chat": true}', "is no conversation"),
        ('{"dist_moe_chat": 2, "messages": []}', "has format 2, this dist-moe reads 1"),
        ('{"dist_moe_chat": 1, "messages": [], "x": 1}', "unknown field 'x'"),
        ('{"dist_moe_chat": 1}', "expected a list of messages"),
        ('{"dist_moe_chat": 1, "messages": [{"role": "king"}]}', "message 1: role"),
        ('{"dist_moe_chat": 1, "messages": [{"role": "assistant", "content": "x"}]}', "begins with 'assistant'"),
        (
            '{"dist_moe_chat": 1, "messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}',
            "message 2: a system prompt can only come first",
        ),
    ],
)
def test_files_that_are_no_conversation(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        load_conversation(path, "/load")
    assert str(caught.value).startswith(f"/load {path}: ")


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    _, err, _ = Script([], f"/load {tmp_path}/none", f"/save {tmp_path}/none/c.json", f"/save {tmp_path}").run()
    assert len([line for line in err.splitlines() if line.startswith("dist-moe: error: ")]) == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/save /", "/ is a directory"),
        ("/save {here}/file/c.json", "cannot be written"),
        (f"/save {{here}}/{'x' * 300}", "cannot be looked at"),
        ("/save a\0b", "cannot be the name of a file"),
        ("/save ~nobody-here/c.json", "there is no such user"),
        ("/load ~nobody-here/c.json", "there is no such user"),
        ("/tools ~nobody-here/c.json", "there is no such user"),
    ],
)
def test_names_that_no_file_can_have_do_not_end_the_chat(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "file").write_text("")
    script = Script([done("x")], line.format(here=tmp_path), "still here")
    _, err, _ = script.run()
    assert words in err
    assert len(script.requests) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_result_can_be_named_once_more(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("sun")
    call = ToolCall("weather", {}, "1").to_json()
    script = Script([done("", tool_calls=[call]), done("x")], "a", "@~nobody-here/r", f"@{tmp_path}/r")
    _, err, _ = script.run()
    assert "there is no such user" in err
    assert contents(script.requests[1])[-1] == ("tool", "sun")


def test_an_empty_system_prompt_is_replaced_by_another() -> None:
    conversation = Conversation([Message("system", ""), Message("user", "x")])
    conversation.system = "s"
    assert conversation.messages == [Message("system", "s"), Message("user", "x")]


def test_a_saved_conversation_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text("old")
    path.chmod(0o644)
    Conversation([Message("user", "x")]).save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="half a surrogate pair"):
        Conversation([Message("user", "\ud800")]).save(path)
    assert load_conversation(path, "/load").messages == [Message("user", "x")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_thinking_is_dim_on_a_terminal_and_nobodys_text_moves_its_cursor() -> None:
    out = Terminal()
    display = Display(show_thinking=True, environ={"TERM": "xterm"}, out=out, err=out)
    display.piece("hm", "reasoning")
    display.piece("\x1b]0;owned\x07\x9b2Jyes\n", "answer")
    display.end_answer()
    assert out.getvalue() == "\x1b[2mhm\x1b[0m\n\n]0;owned2Jyes\n"


@pytest.mark.parametrize(("shown", "expected"), [(True, "[thinking]\nhm\n[end of thinking]\nyes\n"), (False, "yes\n")])
def test_thinking_in_a_pipe(shown: bool, expected: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    display = Display(show_thinking=shown, environ={"TERM": "xterm"}, out=out, err=err)
    display.piece("h", "reasoning")
    display.piece("m", "reasoning")
    display.piece("yes", "answer")
    display.end_answer()
    assert out.getvalue() == expected
    assert err.getvalue() == ("" if shown else "thinking ...\n")
