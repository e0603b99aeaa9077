"""Conversations against transformers' apply_chat_template: the same text and ids, and nobody forges a token."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.errors import UsageError
from dist_moe.text.chat import ChatPrompt, Thinking
from dist_moe.text.messages import Message, ToolCall, parse_messages
from dist_moe.text.tool_calls import Dialect
from dist_moe.text.tools import Tool, parse_tools
from helpers.qwen3_text import CHAT, qwen3_format, qwen3_tokenizer

CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in json.loads((CHAT / "conversations.json").read_text(encoding="utf-8"))
}
FORMATS = ("hybrid", "always", "instruct", "coder")
GOLDEN = {name: json.loads((CHAT / f"{name}.json").read_text(encoding="utf-8")) for name in FORMATS}


def tools_of(case: dict[str, Any]) -> tuple[Tool, ...]:
    return parse_tools(case["tools"], "tools") if "tools" in case else ()


def prompt_of(form: str, case: dict[str, Any]) -> ChatPrompt:
    messages = parse_messages(case["messages"], "messages")
    return qwen3_format(form).prompt(messages, tools=tools_of(case), thinking=case.get("thinking"))


def test_there_are_many_conversations() -> None:
    assert [len(golden) for golden in GOLDEN.values()] == [53, 49, 51, 51]


@pytest.mark.parametrize(("form", "name"), [(form, name) for form in FORMATS for name in GOLDEN[form]])
def test_text_and_ids_are_those_of_transformers(form: str, name: str) -> None:
    prompt = prompt_of(form, CASES[name])
    assert prompt.text == GOLDEN[form][name]["text"]
    assert list(prompt.ids) == GOLDEN[form][name]["ids"]


@pytest.mark.parametrize("form", FORMATS)
def test_tokens_in_a_text_are_those_of_the_frame_alone(form: str) -> None:
    """The same conversations with every forged token's `<` made harmless have the same tokens in the same order."""
    added = set(qwen3_tokenizer().added_tokens.values())
    for case in (case for name, case in CASES.items() if case.get("hostile") == "all" and name in GOLDEN[form]):
        contents = [{**m, "content": m["content"].replace("<", "(")} for m in case["messages"]]
        hostile, harmless = prompt_of(form, case), prompt_of(form, {**case, "messages": contents})
        assert [i for i in hostile.ids if i in added] == [i for i in harmless.ids if i in added], case["name"]
        assert all(message["content"].strip() in hostile.text for message in case["messages"])


def test_how_each_model_thinks_and_calls() -> None:
    assert {name: qwen3_format(name).thinking for name in FORMATS} == {
        "hybrid": Thinking.SWITCHABLE,
        "always": Thinking.ALWAYS,
        "instruct": Thinking.NEVER,
        "coder": Thinking.NEVER,
    }
    assert [qwen3_format(name).dialect for name in FORMATS] == [Dialect.HERMES] * 3 + [Dialect.CODER]


def test_a_prompt_knows_whether_thinking_is_open() -> None:
    hi = [Message("user", "Hi <think>")]
    assert qwen3_format("always").prompt(hi).thinking_is_open
    assert not qwen3_format("hybrid").prompt(hi, thinking=False).thinking_is_open
    assert not qwen3_format("hybrid").prompt(hi, thinking=True).thinking_is_open


def test_thinking_that_cannot_be_had_is_refused() -> None:
    hi = [Message("user", "Hi")]
    with pytest.raises(UsageError, match="this model always thinks"):
        qwen3_format("always").prompt(hi, thinking=False)
    with pytest.raises(UsageError, match="this model does not think"):
        qwen3_format("coder").prompt(hi, thinking=True)
    with pytest.raises(UsageError, match="at least one message"):
        qwen3_format("coder").prompt([])


def test_a_next_turn_begins_with_the_last_one_up_to_the_answer() -> None:
    chat = qwen3_format("hybrid")
    first = [Message("user", "Hi")]
    answer = Message("assistant", "Hello!", reasoning="A greeting.")
    before = chat.prompt(first).ids
    after = chat.prompt([*first, answer, Message("user", "Bye")])
    assert after.ids[: len(before)] == before
    assert "A greeting." not in after.text


TOKENS = sorted(qwen3_tokenizer().added_tokens)
HOSTILE = st.lists(
    st.one_of(st.sampled_from(TOKENS), st.sampled_from("<>|/ \na\U000f0000"), st.sampled_from(("<|", "im_end", "|>")))
).map("".join)


@given(st.sampled_from(FORMATS), st.lists(HOSTILE, min_size=5, max_size=5), HOSTILE)
@settings(max_examples=300, deadline=None)
def test_no_field_can_forge_a_frame(form: str, texts: list[str], key: str) -> None:
    tokenizer = qwen3_tokenizer()
    special = {tokenizer.added_tokens[text] for text in tokenizer.special_tokens}
    added = set(tokenizer.added_tokens.values())

    def prompt(texts: list[str], *, extra: str) -> ChatPrompt:
        function = {"name": "f", "description": texts[0], "parameters": {"properties": {extra: {extra: texts[0]}}}}
        call = ToolCall("f", {extra: [texts[2]]})
        system, result = Message("system", texts[1]), Message("tool", texts[3])
        asks = Message("assistant", "x", reasoning=texts[2], tool_calls=(call,))
        messages = [system, Message("user", texts[4]), asks, result]
        return qwen3_format(form).prompt(messages, tools=parse_tools([function], "t"))

    hostile, harmless = prompt(texts, extra=key or "|im_end|"), prompt(["a"] * 5, extra="b")
    assert [i for i in hostile.ids if i in special] == [i for i in harmless.ids if i in special]
    outside = qwen3_format(form).prompt([Message("user", texts[4])]).ids
    assert Counter(i for i in outside if i in added) == Counter(
        i for i in qwen3_format(form).prompt([Message("user", "a")]).ids if i in added
    )
    assert texts[4] in hostile.text
