"""The functions that a model may call, from a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_moe.errors import UsageError
from dist_moe.text.messages import require_name


@dataclass(frozen=True)
class Tool:
    """One function: its definition in OpenAI's form, as the templates read it."""

    name: str
    definition: Mapping[str, Any]

    def parameter(self, name: str) -> Mapping[str, Any]:
        """The JSON schema of one parameter; empty if the definition says nothing about it."""
        parameters = self.definition["function"].get("parameters") or {}
        found = parameters.get("properties", {}).get(name)
        return found if isinstance(found, dict) else {}


def read_tools(path: Path, where: str = "--tools") -> tuple[Tool, ...]:
    """The tools in a file: a list of `{"type": "function", "function": {...}}` or of bare functions, or just one.

    Args:
        path: A JSON file.
        where: The option that names it, for errors.

    Raises:
        UsageError: The file cannot be read, or does not define tools.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{where} {path}: cannot be read as JSON: {error}") from error
    return parse_tools(value, f"{where} {path}")


def parse_tools(value: Any, where: str) -> tuple[Tool, ...]:
    """The tools that a JSON value defines.

    Raises:
        UsageError: It defines none, something else, or one name twice.
    """
    values = [value] if isinstance(value, dict) else value
    if not isinstance(values, list) or not values:
        raise UsageError(f"{where}: expected a list of functions, found {_kind(value)}")
    tools = tuple(_parse_tool(tool, f"{where}: tool {n}") for n, tool in enumerate(values, 1))
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{where}: two tools are called {twice!r}: give each its own name")
    return tools


def _parse_tool(value: Any, where: str) -> Tool:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or (function is not value and value.get("type", "function") != "function"):
        raise UsageError(
            f'{where}: expected {{"type": "function", "function": {{"name": ..., "parameters": {{...}}}}}} '
            f"or the bare function, found {_kind(value)}"
        )
    name = require_name(function.get("name"), where)
    where = f"{where} ({name})"
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise UsageError(f"{where}: description: expected a text, found {_kind(description)}")
    _check_parameters(function.get("parameters"), where)
    definition = {"type": "function", **value} if function is not value else {"type": "function", "function": value}
    return Tool(name, definition)


def _check_parameters(parameters: Any, where: str) -> None:
    if parameters is None:
        return
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise UsageError(f'{where}: parameters: expected a JSON schema of type "object", found {_kind(parameters)}')
    properties = parameters.get("properties", {})
    if not isinstance(properties, dict):
        raise UsageError(f"{where}: parameters: properties: expected an object, found {_kind(properties)}")
    strange = [name for name, schema in properties.items() if not isinstance(schema, dict)]
    if strange:
        raise UsageError(
            f"{where}: parameters: {strange[0]}: expected a JSON schema, found {_kind(properties[strange[0]])}"
        )
    required = parameters.get("required", [])
    if not isinstance(required, list):
        raise UsageError(f"{where}: parameters: required: expected a list of names, found {_kind(required)}")


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {json.dumps(value, ensure_ascii=False)[:60]}"
