"""A model's chat template: messages become the text frame that the model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2

from dist_moe import files as file_system
from dist_moe.errors import CheckpointError, UsageError
from dist_moe.text.json_file import read_json_object
from dist_moe.text.template_limits import BoundedEnvironment

TEMPLATE_FILE = "chat_template.jinja"
EXTRA_TEMPLATES = "additional_chat_templates"
STORED_TEMPLATES = "additional_chat_templates.json"
LEGACY_FILE = "chat_template.json"
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
        self._environment = BoundedEnvironment()
        self._environment.filters["tojson"] = _to_json
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = _strftime_now
        try:
            with self._environment.limits():
                self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{origin}: line {error.lineno} is not valid Jinja: {error.message}") from error
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"{origin} cannot be used as a template: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of a conversation.

        Args:
            messages: Mappings with `role`, `content` and what else the template reads, oldest first.
            variables: `tools`, `add_generation_prompt`, `enable_thinking` and whatever else the template knows.

        Raises:
            UsageError: The template refuses the messages or fails on them.
        """
        try:
            with self._environment.limits():
                return self._template.render(messages=messages, **variables)
        except Exception as error:  # somebody else's code may raise anything
            raise UsageError(f"{self.origin} cannot render these messages: {error}") from error


def read_chat_templates(directory: Path) -> dict[str, ChatTemplate]:
    """All templates of a model by name, the usual one under `default`; empty if it has none.

    As in transformers: where there is `chat_template.jinja` or a file in `additional_chat_templates/` (in a store: one
    JSON object of them), these count alone; else those in `tokenizer_config.json`, one text or a list of named ones.
    A default template that is still missing comes from the next place, at last from `chat_template.json`, where
    processors of older releases of transformers have it.

    Raises:
        CheckpointError: A file cannot be read, or a template is not valid.
    """
    found = _file_sources(directory)
    for name in ("tokenizer_config.json", LEGACY_FILE):
        if DEFAULT not in found:
            found = _json_sources(directory / name) | found
    return {name: ChatTemplate(source.text, source.origin) for name, source in found.items()}


@dataclass(frozen=True)
class _Source:
    text: str
    origin: str


def _file_sources(directory: Path) -> dict[str, _Source]:
    file, stored = directory / TEMPLATE_FILE, directory / STORED_TEMPLATES
    found = {DEFAULT: _read(file)} if file_system.is_file(file) else {}
    found |= {name: _Source(str(text), f"{stored}: {name}") for name, text in read_json_object(stored).items()}
    return found | {path.stem: _read(path) for path in sorted((directory / EXTRA_TEMPLATES).glob("*.jinja"))}


def _read(path: Path) -> _Source:
    try:
        return _Source(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as text: {error}") from error


def _json_sources(path: Path) -> dict[str, _Source]:
    value = read_json_object(path).get("chat_template")
    if value is None:
        return {}
    named = [{"name": DEFAULT, "template": value}] if isinstance(value, str) else value
    origin = f"{path}: chat_template"
    try:
        return {str(entry["name"]): _Source(str(entry["template"]), f"{origin} {entry['name']!r}") for entry in named}
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{origin}: expected a string or a list of {{name, template}}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which would change the tokens.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
