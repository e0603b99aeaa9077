"""Answers as they arrive: thinking, text and tool calls, by whole tokens and cut anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.errors import UsageError
from dist_moe.text.answer import AnswerStream, Delta
from dist_moe.text.markers import MarkerStream, Span
from dist_moe.text.messages import Message, ToolCall
from dist_moe.text.reasoning import EARLY_STOP
from dist_moe.text.stream import TextStream
from dist_moe.text.tool_calls import Dialect, parse_call
from dist_moe.text.tools import Tool, parse_tools
from helpers.qwen3_text import qwen3_format, qwen3_tokenizer

TOOLS = parse_tools(
    [
        {
            "name": "f",
            "parameters": {
                "properties": {
                    "s": {"type": "string"},
                    "n": {"type": "integer"},
                    "x": {"type": "number"},
                    "b": {"type": "boolean"},
                    "l": {"type": "array"},
                    "o": {"type": "object"},
                    "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                    "any": {"type": ["integer", "number"]},
                    "either": {"type": ["string", "integer"]},
                }
            },
        },
        {"name": "g"},
    ],
    "tools",
)


class Bytes:
    """A tokenizer without added tokens: one id per byte."""

    def __init__(self) -> None:
        self.added_tokens: dict[str, int] = {}

    def stream(self) -> TextStream:
        return TextStream(lambda token: bytes([token]))


def read(answer: AnswerStream, ids: Sequence[int]) -> Delta:
    total = Delta()
    for token in ids:
        total += answer.push(token)
    total += answer.finish()
    assert (total.content, total.calls) == (answer.message.content, answer.message.tool_calls)
    return total


def by_tokens(text: str, form: str = "hybrid", tools: tuple[Tool, ...] = TOOLS) -> Delta:
    chat = qwen3_format(form)
    prompt = chat.prompt([Message("user", "Hi")])
    return read(chat.answer(prompt, tools), qwen3_tokenizer().encode_trusted(text))


def by_bytes(text: str, form: str = "hybrid", tools: tuple[Tool, ...] = TOOLS) -> Delta:
    dialect = Dialect.CODER if form == "coder" else Dialect.HERMES
    stream = AnswerStream(Bytes(), thinking_is_open=form == "always", dialect=dialect, tools=tools)  # type: ignore[arg-type]
    return read(stream, text.encode())


CALL = '<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool_call>'
CODER = (
    "<tool_call>\n<function=f>\n<parameter=s>\n a\nb\n</parameter>\n"
    "<parameter=n>\n7\n</parameter>\n</function>\n</tool_call>"
)
ANSWERS: list[tuple[str, str, Delta]] = [
    ("hybrid", "<think>\nOne.\n\nTwo.\n</think>\n\nHello\n\nyou\n", Delta("One.\n\nTwo.", "Hello\n\nyou\n")),
    ("hybrid", "<think>\n\n</think>\n\nHello", Delta("", "Hello")),
    ("hybrid", "Hello größer 你好", Delta("", "Hello größer 你好")),
    ("hybrid", "\n\n <b>Hello", Delta("", "\n\n <b>Hello")),
    ("hybrid", "", Delta()),
    ("hybrid", "\n", Delta()),
    ("hybrid", "<think>\ncut of", Delta("cut of")),
    ("hybrid", "Hello <think>x</think> y", Delta("", "Hello <think>x</think> y")),
    ("hybrid", "</think>\n\nHello", Delta("", "Hello")),
    ("hybrid", "<think>a<think>b</think>c</think>d", Delta("a<think>b", "c</think>d")),
    ("always", "One.\n</think>\n\nHello", Delta("One.", "Hello")),
    ("always", "\n\nOne.", Delta("One.")),
    ("hybrid", f"<think>\nx\n</think>\n\nLook.\n{CALL}\n{CALL}", Delta("x", "Look.", (ToolCall("f", {"n": 1}),) * 2)),
    ("hybrid", f"<think>\nx{CALL}", Delta("x", "", (ToolCall("f", {"n": 1}),))),
    ("hybrid", f"{CALL}\n\nDone.\n", Delta("", "Done.", (ToolCall("f", {"n": 1}),))),
    ("hybrid", f"Look.\n{CALL}\n{CALL}\nAnd\n", Delta("", "Look.\nAnd", (ToolCall("f", {"n": 1}),) * 2)),
    ("coder", f"Go.\n{CODER}", Delta("", "Go.", (ToolCall("f", {"s": " a\nb", "n": 7}),))),
]


@pytest.mark.parametrize(("form", "text", "expected"), ANSWERS)
def test_an_answer_is_split(form: str, text: str, expected: Delta) -> None:
    assert by_tokens(text, form) == expected
    assert by_bytes(text, form) == expected


def test_message_goes_back_into_the_conversation() -> None:
    chat = qwen3_format("hybrid")
    messages = [Message("user", "Hi")]
    answer = chat.answer(chat.prompt(messages), TOOLS)
    text = f"<think>\nHm.\n</think>\n\nLook.\n{CALL}"
    read(answer, qwen3_tokenizer().encode_trusted(text))
    assert answer.message == Message("assistant", "Look.", "Hm.", (ToolCall("f", {"n": 1}),))
    again = chat.prompt([*messages, answer.message, Message("tool", "2")])
    assert text in again.text


def test_thinking_is_told_apart_from_no_thinking() -> None:
    chat = qwen3_format("hybrid")
    prompt = chat.prompt([Message("user", "Hi")])
    thought, plain = chat.answer(prompt), chat.answer(prompt)
    read(thought, qwen3_tokenizer().encode_trusted("<think>\n\n</think>\n\nA"))
    read(plain, qwen3_tokenizer().encode_trusted("A"))
    assert (thought.message.reasoning, plain.message.reasoning) == ("", None)


def test_characters_of_a_marker_made_of_other_tokens_are_text() -> None:
    chat = qwen3_format("hybrid")
    ids = [
        *qwen3_tokenizer().encode_trusted("<think>\nno "),
        *qwen3_tokenizer().encode("</th"),
        *qwen3_tokenizer().encode("ink>"),
    ]
    assert read(chat.answer(chat.prompt([Message("user", "Hi")])), ids).reasoning == "no </think>"


def test_a_call_is_shown_only_when_it_is_whole() -> None:
    chat = qwen3_format("hybrid")
    answer = chat.answer(chat.prompt([Message("user", "Hi")]), TOOLS)
    deltas = [answer.push(token) for token in qwen3_tokenizer().encode_trusted(CALL)]
    assert deltas[:-1] == [Delta()] * (len(deltas) - 1)
    assert deltas[-1].calls == (ToolCall("f", {"n": 1}),)


@pytest.mark.parametrize(
    ("form", "body", "reason"),
    [
        ("hybrid", '{"name": "f", "arguments": {"n": 1}', "not valid JSON: Expecting ',' delimiter"),
        ("hybrid", '{"name": "f", "arguments": [1]}', r"f: arguments: expected an object, found \[1\]"),
        ("hybrid", '{"name": "h", "arguments": {}}', "'h' is none of the tools"),
        ("hybrid", '{"arguments": {}}', "name: expected 1 to 64 letters"),
        ("hybrid", "[1]", "expected"),
        ("hybrid", "[" * 100000, "not valid JSON"),
        ("hybrid", '{"name": "f", "arguments": "' + "[" * 100000 + '"}', "f: arguments are not valid JSON"),
        ("coder", "<function=f>oh<parameter=n>1</parameter></function>", "'oh' stands outside <parameter=KEY>"),
        ("coder", "<function=f><parameter=n>1</parameter><parameter=n>2</parameter></function>", "n is given twice"),
        ("coder", "f(1)", "not of the form <function=NAME>"),
        ("coder", "<function=a b></function>", "name: expected 1 to 64 letters"),
    ],
)
def test_a_malformed_call_stays_text_with_a_note(form: str, body: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        parse_call(body, qwen3_format(form).dialect or Dialect.HERMES, TOOLS)
    text = f"<tool_call>\n{body}\n</tool_call>"
    found = by_bytes(f"A\n{text}", form)
    assert (found.content, found.calls) == ("A\n" + text, ())
    assert found.notes == (f"a tool call was kept as text: {error.value}",)


def test_a_call_that_the_end_cuts_off_stays_text() -> None:
    text = CODER[: CODER.index("</function>")]
    found = by_tokens(text, "coder")
    assert (found.content, found.calls) == (text, ())
    assert found.notes == ("a tool call was kept as text: the answer ended before </tool_call>",)
    assert by_tokens(CALL[:-20]).content == CALL[:-20]


def test_a_call_that_lacks_only_its_outer_tags_is_one() -> None:
    assert by_tokens(CALL[: -len("</tool_call>")]).calls == (ToolCall("f", {"n": 1}),)
    bare = CODER[len("<tool_call>\n") : -len("</tool_call>")]
    assert by_tokens(f"Go.\n{bare}", "coder") == Delta("", "Go.", (ToolCall("f", {"s": " a\nb", "n": 7}),))
    assert by_tokens("Write <function=f>, then", "coder").content == "Write <function=f>, then"


def test_a_prompt_brings_its_tools_along() -> None:
    chat, ids = qwen3_format("always"), qwen3_tokenizer().encode_trusted(f"So {CALL}")
    prompt = chat.prompt([Message("user", "Hi")], tools=TOOLS)
    assert read(chat.answer(prompt), ids) == Delta("So ", "", (ToolCall("f", {"n": 1}),))
    budget = chat.thinking_budget(4, prompt)
    assert [budget.push(token) for token in ids] == [()] * len(ids)


def test_without_tools_a_call_is_text() -> None:
    assert by_tokens(f"A\n{CALL}", tools=()) == Delta(content=f"A\n{CALL}")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("s", "12", "12"),
        ("s", "\n x \n", "\n x \n"),
        ("s", "", ""),
        ("s", "<b></parameter x>", "<b></parameter x>"),
        ("n", "12", 12),
        ("n", " 12 ", 12),
        ("n", "12.0", 12),
        ("n", "12.5", "12.5"),
        ("n", "twelve", "twelve"),
        ("n", "true", "true"),
        ("any", "12.0", 12.0),
        ("x", "1e3", 1000.0),
        ("x", "2", 2),
        ("b", "true", True),
        ("b", "False", False),
        ("b", "1", "1"),
        ("l", '["a", 1]', ["a", 1]),
        ("o", '{"a": null}', {"a": None}),
        ("o", "[1]", "[1]"),
        ("maybe", "None", None),
        ("maybe", "3", 3),
        ("either", "3", 3),
        ("either", "three", "three"),
        ("unknown", "3", "3"),
    ],
)
def test_parameters_are_typed_by_the_schema(key: str, text: str, value: Any) -> None:
    body = f"\n<function=f>\n<parameter={key}>\n{text}\n</parameter>\n</function>\n"
    found = parse_call(body, Dialect.CODER, TOOLS).arguments
    assert found == {key: value}
    assert type(found[key]) is type(value)


@pytest.mark.parametrize("kind", [5, None, [["string"]], {}])
def test_a_schema_with_a_strange_type_leaves_text(kind: Any) -> None:
    tools = parse_tools({"name": "g", "parameters": {"properties": {"x": {"type": kind}}}}, "t")
    assert parse_call("<function=g><parameter=x>3</parameter></function>", Dialect.CODER, tools).arguments == {"x": "3"}


def test_forgotten_closing_tags_are_forgiven() -> None:
    body = "<function=f><parameter=s>a\n<parameter=n>2</parameter>"
    assert parse_call(body, Dialect.CODER, TOOLS) == ToolCall("f", {"s": "a", "n": 2})
    assert parse_call("<function=g>\n</function>", Dialect.CODER, TOOLS) == ToolCall("g", {})


PIECES = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", "\n", "a", "<", "</", "ü", '{"name": "g"}', "<function=g>"]
)


@given(st.lists(PIECES).map("".join), st.sampled_from(["hybrid", "always", "coder"]))
@settings(max_examples=500, deadline=None)
def test_tokens_and_bytes_agree_and_nothing_is_lost(text: str, form: str) -> None:
    found = by_bytes(text, form)
    assert by_tokens(text, form) == found
    if "<t" not in text and "</" not in text:
        joined = found.reasoning if form == "always" else found.content
        assert joined.strip("\n") == text.strip("\n")


@given(st.lists(PIECES).map("".join))
def test_markers_and_text_together_are_the_whole_text(text: str) -> None:
    stream = MarkerStream(Bytes(), ("<think>", "</think>"))  # type: ignore[arg-type]
    spans = [span for byte in text.encode() for span in stream.push(byte)] + stream.finish()
    assert "".join(span.text for span in spans) == text
    assert [span for span in spans if span.marker] == [
        Span(part, marker=True)
        for part in text.replace("<t", "\0<t").replace("</t", "\0</t").replace(">", ">\0").split("\0")
        if part in ("<think>", "</think>")
    ]


def run_budget(form: str, tokens: int, text: str, thinking: bool | None = None) -> tuple[str, int]:
    """What an answer of these tokens becomes, and how many of them were taken before the rest was forced."""
    chat, tokenizer = qwen3_format(form), qwen3_tokenizer()
    budget = chat.thinking_budget(tokens, chat.prompt([Message("user", "Hi")], thinking=thinking))
    forced, taken = list(budget.start()), 0
    for token in tokenizer.encode_trusted(text) if not forced else []:
        taken += 1
        forced = list(budget.push(token))
        if forced:
            break
    return tokenizer.decode(forced), taken


@given(st.lists(PIECES).map("".join), st.integers(0, 6), st.sampled_from(["hybrid", "always"]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_budget_and_the_answer_agree_on_where_thinking_is(text: str, tokens: int, form: str, tools: bool) -> None:
    chat, tokenizer = qwen3_format(form), qwen3_tokenizer()
    prompt = chat.prompt([Message("user", "Hi")], tools=TOOLS if tools else ())
    budget, answer = chat.thinking_budget(tokens, prompt), chat.answer(prompt)
    forced, thought = list(budget.start()), 0
    for token in [] if forced else tokenizer.encode_trusted(text):
        thought += answer.is_thinking
        answer.push(token)
        if forced := list(budget.push(token)):
            break
        assert thought <= tokens or not answer.is_thinking
    if forced:
        assert answer.is_thinking
        assert thought == tokens
        for token in forced:
            answer.push(token)
        assert not answer.is_thinking


def test_a_thinking_budget_closes_thinking_once() -> None:
    long = "one two three four five six"  # six tokens
    assert run_budget("always", 3, long) == (EARLY_STOP, 3)
    assert run_budget("always", 0, long) == (EARLY_STOP, 0)
    assert run_budget("hybrid", 3, "<think>" + long) == (EARLY_STOP, 4)
    assert run_budget("hybrid", 0, "<think>" + long) == (EARLY_STOP, 1)
    assert run_budget("hybrid", 3, long) == ("", 6)
    assert run_budget("always", 3, "one two</think>" + long) == ("", 9)
    assert run_budget("hybrid", 3, long, thinking=False) == ("", 6)
    chat = qwen3_format("always")
    budget = chat.thinking_budget(1, chat.prompt([Message("user", "Hi")]))
    assert [bool(budget.push(token)) for token in range(100, 105)] == [True, False, False, False, False]
