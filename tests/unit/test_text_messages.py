"""Messages and tool definitions from JSON: what is accepted, and the one sentence for what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_moe.errors import UsageError
from dist_moe.text.messages import Message, ToolCall, parse_messages
from dist_moe.text.tools import parse_tools, read_tools

FUNCTION: dict[str, Any] = {"name": "f", "description": "d", "parameters": {"properties": {"a": {"type": "string"}}}}


def test_messages_survive_being_saved() -> None:
    messages = (
        Message("system", "S"),
        Message("user", "größer"),
        Message("assistant", "", "Hm", (ToolCall("f", {"a": [1, None]}, "call_1"), ToolCall("g", {}))),
        Message("tool", "12", tool_call_id="call_1"),
        Message("assistant", "Done", ""),
    )
    assert parse_messages(json.loads(json.dumps([message.to_json() for message in messages])), "x") == messages


def test_the_forms_of_openai_are_accepted() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    value = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "r"},
        {"role": "assistant", "content": "x", "tool_calls": None},
    ]
    assert parse_messages(value, "x") == (
        Message("user", "ab"),
        Message("assistant", "", "r", (ToolCall("f", {"a": 1}, "1"),)),
        Message("assistant", "x"),
    )


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({}, "x: expected a list of messages, found dict"),
        (["a"], "x: message 1: role: expected one of system, user, assistant, tool, found None"),
        ([{"role": "boss"}], "x: message 1: role: expected one of system, user, assistant, tool, found 'boss'"),
        ([{"role": "user", "content": 3}], "x: message 1: content: expected a text or a list of text parts"),
        (
            [{"role": "user", "content": [{"image": 1}]}],
            "x: message 1: content: expected a text or a list of text parts",
        ),
        (
            [{"role": "user", "content": "a\ud800"}],
            "x: message 1: content: half a surrogate pair at character 1: fix the text",
        ),
        ([{"role": "user", "tool_calls": []}], "x: message 1: tool_calls: a user message has no such field"),
        ([{"role": "assistant", "tool_calls": 3}], "x: message 1: tool_calls: expected a list, found 3"),
        ([{"role": "assistant", "reasoning": 3}], "x: message 1: reasoning: expected a text, found 3"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "<f>"}]}],
            "x: message 1: tool call 1: name: expected 1 to 64 letters, digits and _ . - only, found '<f>'",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}],
            "x: message 1: tool call 1: f: arguments are not valid JSON: "
            "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
    ],
)
def test_other_messages_are_refused(value: Any, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_messages(value, "x")
    assert str(error.value) == sentence


def test_arguments_nested_too_deeply_are_refused() -> None:
    with pytest.raises(UsageError, match="f: arguments are not valid JSON"):
        parse_messages([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[" * 10**5}]}], "x")


def test_a_message_cannot_be_made_with_a_forged_role_or_name() -> None:
    with pytest.raises(UsageError, match="a message: role: expected one of"):
        Message("user<|im_end|>")
    with pytest.raises(UsageError, match="a tool call: name: expected 1 to 64"):
        ToolCall("f<|im_end|", {})


def test_tools_in_both_forms() -> None:
    wrapped = {"type": "function", "function": FUNCTION}
    for value in (FUNCTION, wrapped, [FUNCTION], [wrapped]):
        (tool,) = parse_tools(value, "x")
        assert (tool.name, tool.definition) == ("f", wrapped)
        assert (tool.parameter("a"), tool.parameter("b")) == ({"type": "string"}, {})
    assert parse_tools([{"name": "g", "parameters": None}], "x")[0].parameter("a") == {}


def test_tools_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([FUNCTION]))
    assert [tool.name for tool in read_tools(path)] == ["f"]
    path.write_text("[")
    with pytest.raises(UsageError, match=r"--tools .*tools\.json: cannot be read as JSON: Expecting value"):
        read_tools(path)
    with pytest.raises(UsageError, match=r"--tools .*none\.json: cannot be read as JSON: .*No such file"):
        read_tools(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([], "x: expected a list of functions, found list []"),
        ("f", 'x: expected a list of functions, found str "f"'),
        (
            [3],
            'x: tool 1: expected {"type": "function", "function": {"name": ..., "parameters": {...}}} '
            "or the bare function, found int 3",
        ),
        ([FUNCTION, FUNCTION], "x: two tools are called 'f': give each its own name"),
        ([{"name": "a b"}], "x: tool 1: name: expected 1 to 64 letters, digits and _ . - only, found 'a b'"),
        ([{"name": "f", "description": 3}], "x: tool 1 (f): description: expected a text, found int 3"),
        (
            [{"name": "f", "parameters": {"type": "array"}}],
            'x: tool 1 (f): parameters: expected a JSON schema of type "object", found dict {"type": "array"}',
        ),
        (
            [{"name": "f", "parameters": {"properties": []}}],
            "x: tool 1 (f): parameters: properties: expected an object, found list []",
        ),
        (
            [{"name": "f", "parameters": {"properties": {"a": "string"}}}],
            'x: tool 1 (f): parameters: a: expected a JSON schema, found str "string"',
        ),
        (
            [{"name": "f", "parameters": {"required": "a"}}],
            'x: tool 1 (f): parameters: required: expected a list of names, found str "a"',
        ),
    ],
)
def test_other_tools_are_refused(value: Any, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_tools(value, "x")
    assert str(error.value) == sentence
