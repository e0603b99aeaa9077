"""Tool calls as models write them, between <tool_call> and </tool_call>."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dist_moe.errors import UsageError
from dist_moe.text.messages import ToolCall, parse_tool_call, require_name
from dist_moe.text.tools import Tool

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
FUNCTION_OPEN, FUNCTION_CLOSE = "<function=", "</function>"
FUNCTION = re.compile(r"\s*<function=([^>\n]*)>(.*?)(?:</function>\s*)?", re.DOTALL)
# A value ends before the next tag of its own kind: models forget </parameter>.
PARAMETER = re.compile(
    r"<parameter=([^>\n]*)>\n?(.*?)(?:\n?</parameter>(?=\s*(?:<parameter=|\Z))|\n?(?=<parameter=)|\n?\Z)", re.DOTALL
)


class Dialect(enum.Enum):
    """How a model writes a call."""

    HERMES = "hermes"
    CODER = "coder"


def find_dialect(template: str) -> Dialect | None:
    """The dialect that a template's source shows; None if it shows none."""
    if FUNCTION_OPEN in template:
        return Dialect.CODER
    return Dialect.HERMES if CALL_OPEN in template else None


def parse_call(body: str, dialect: Dialect, tools: Sequence[Tool]) -> ToolCall:
    """The call in a block.

    Args:
        body: What stands between the two tags.
        dialect: How the model writes calls.
        tools: The functions that it may call, whose schemas give the arguments their types.

    Raises:
        UsageError: The block is no call of one of the tools; the message says why.
    """
    call = _parse_hermes(body) if dialect is Dialect.HERMES else _parse_coder(body, tools)
    if call.name not in [tool.name for tool in tools]:
        raise UsageError(f"{call.name!r} is none of the tools")
    return call


def is_closed(body: str, dialect: Dialect) -> bool:
    """Whether a block that can be parsed is whole even without its closing tag."""
    return dialect is Dialect.HERMES or body.rstrip().endswith(FUNCTION_CLOSE)


def _parse_hermes(body: str) -> ToolCall:
    try:
        value = json.loads(body.strip())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not valid JSON: {error}") from error
    return parse_tool_call(value, "not a call")


def _parse_coder(body: str, tools: Sequence[Tool]) -> ToolCall:
    function = FUNCTION.fullmatch(body)
    if function is None:
        raise UsageError("not of the form <function=NAME><parameter=KEY>VALUE</parameter></function>")
    name = require_name(function[1].strip(), "not a call")
    tool = next((tool for tool in tools if tool.name == name), None)
    arguments: dict[str, Any] = {}
    place = 0
    text = function[2].rstrip()
    for match in PARAMETER.finditer(text):
        _require_blank(text[place : match.start()])
        key = match[1].strip()
        if key in arguments:
            raise UsageError(f"parameter {key} is given twice")
        arguments[key] = typed(match[2], tool.parameter(key) if tool else {})
        place = match.end()
    _require_blank(text[place:])
    return ToolCall(name, arguments)


def _require_blank(text: str) -> None:
    if text.strip():
        raise UsageError(f"{text.strip()[:40]!r} stands outside <parameter=KEY>...</parameter>")


def typed(text: str, schema: Mapping[str, Any]) -> Any:
    """A parameter's value, which the dialect writes without its type.

    Args:
        text: As the model wrote it.
        schema: The parameter's JSON schema. A text stays one; for other types the text is read as JSON if it is of
            the type, else it stays a text, which the tool may refuse.
    """
    kinds = _types(schema)
    if not kinds or (kinds == {"string"}):
        return text
    literal = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text.strip())
    try:
        value = json.loads(literal)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, float) and value.is_integer() and kinds & {"integer"} and not kinds & {"number"}:
        value = int(value)
    return value if _kinds_of(value) & kinds else text


def _types(schema: Mapping[str, Any]) -> set[str]:
    kinds = schema.get("type")
    named = kinds if isinstance(kinds, list) else [kinds]
    found = {kind for kind in named if isinstance(kind, str)}
    for choice in ("anyOf", "oneOf", "allOf"):
        options = schema.get(choice)
        for option in options if isinstance(options, list) else ():
            found |= _types(option) if isinstance(option, dict) else set()
    return found


def _kinds_of(value: Any) -> set[str]:
    if value is None:
        return {"null"}
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int):
        return {"integer", "number"}
    return {{float: "number", str: "string", list: "array", dict: "object"}[type(value)]}
