"""Where a model's chat templates are found, and what a hostile or broken one can do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_moe.errors import CheckpointError, UsageError
from dist_moe.text.chat_template import ChatTemplate, read_chat_templates

HELLO = [{"role": "user", "content": "Hello"}]


def render(directory: Path, name: str = "default") -> str:
    return read_chat_templates(directory)[name].render(HELLO)


def test_a_model_without_templates(tmp_path: Path) -> None:
    assert read_chat_templates(tmp_path) == {}


def test_the_template_in_the_tokenizer_settings(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "[{{ messages[0].content }}]"}))
    assert render(tmp_path) == "[Hello]"


def test_named_templates_in_the_tokenizer_settings(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert (render(tmp_path), render(tmp_path, "tool_use")) == ("d", "t")


def test_the_files_win_over_the_tokenizer_settings(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "json"}))
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("extra")
    assert (render(tmp_path), render(tmp_path, "rag")) == ("file", "extra")


@pytest.mark.parametrize("value", [3, [3], [{"name": "default"}]])
def test_a_template_of_another_shape_is_named(tmp_path: Path, value: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(CheckpointError, match="chat_template: expected a string or a list"):
        read_chat_templates(tmp_path)


def test_a_syntax_error_is_named_with_its_line() -> None:
    with pytest.raises(CheckpointError, match=r"a\.jinja: line 2 is not valid Jinja"):
        ChatTemplate("{{ 1 }}\n{% if %}", "a.jinja")


def test_a_template_can_refuse_messages() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", "a.jinja")
    with pytest.raises(UsageError, match=r"a\.jinja cannot render these messages: roles must alternate"):
        template.render(HELLO)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.x }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(attack: str) -> None:
    with pytest.raises(UsageError):
        ChatTemplate(attack, "a.jinja").render([*HELLO])


def test_blocks_are_trimmed_as_transformers_trims_them() -> None:
    source = "{% for m in messages %}\n  {% if loop.last %}\nx\n  {% endif %}\n{% endfor %}\n"
    assert ChatTemplate(source, "a.jinja").render(HELLO) == "x\n"
