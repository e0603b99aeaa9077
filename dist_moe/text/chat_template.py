"""A model's chat template: messages become the text frame that the model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dist_moe import files as file_system
from dist_moe.errors import CheckpointError, UsageError
from dist_moe.text.json_file import read_json_object

TEMPLATE_FILE = "chat_template.jinja"
EXTRA_TEMPLATES = "additional_chat_templates"
DEFAULT = "default"


class ChatTemplate:
    """One template, compiled in a sandbox: it comes with a checkpoint, so it is somebody else's code."""

    def __init__(self, source: str, origin: str) -> None:
        """Compile a template.

        Args:
            source: Jinja text as transformers reads it (blocks trimmed, `{% break %}` allowed).
            origin: Where it came from, for error messages.

        Raises:
            CheckpointError: The text is not a valid template.
        """
        self.origin = origin
        self.source = source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{origin}: line {error.lineno} is not valid Jinja: {error.message}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of a conversation.

        Args:
            messages: Mappings with `role`, `content` and what else the template reads, oldest first.
            variables: `tools`, `add_generation_prompt`, `enable_thinking` and whatever else the template knows.

        Raises:
            UsageError: The template refuses the messages or fails on them.
        """
        try:
            return self._template.render(messages=messages, **variables)
        except Exception as error:  # somebody else's code may raise anything
            raise UsageError(f"{self.origin} cannot render these messages: {error}") from error


def read_chat_templates(directory: Path) -> dict[str, ChatTemplate]:
    """All templates of a model by name, the usual one under `default`; empty if it has none.

    They live in `chat_template.jinja`, in `additional_chat_templates/*.jinja`, or in `tokenizer_config.json` as one
    string or a list of named ones. The files win over the JSON.

    Raises:
        CheckpointError: A file cannot be read, or a template is not valid.
    """
    templates = _json_templates(directory / "tokenizer_config.json")
    files = {path.stem: path for path in sorted((directory / EXTRA_TEMPLATES).glob("*.jinja"))}
    if file_system.is_file(directory / TEMPLATE_FILE):
        files[DEFAULT] = directory / TEMPLATE_FILE
    for name, path in files.items():
        try:
            templates[name] = ChatTemplate(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read as text: {error}") from error
    return templates


def _json_templates(path: Path) -> dict[str, ChatTemplate]:
    value = read_json_object(path).get("chat_template")
    if value is None:
        return {}
    named = [{"name": DEFAULT, "template": value}] if isinstance(value, str) else value
    origin = f"{path}: chat_template"
    try:
        sources = {entry["name"]: entry["template"] for entry in named}
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{origin}: expected a string or a list of {{name, template}}") from error
    return {name: ChatTemplate(source, f"{origin} {name!r}") for name, source in sources.items()}


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which would change the tokens.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
