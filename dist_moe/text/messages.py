"""What a conversation consists of: messages and tool calls, and their form in JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_moe.errors import UsageError

ROLES = ("system", "user", "assistant", "tool")
# What OpenAI allows as a function's name, and dots; nothing in it can close a tag.
FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
ROLE_FIELDS = {
    "system": {"content"},
    "user": {"content", "name"},
    "assistant": {"content", "name", "reasoning_content", "reasoning", "tool_calls"},
    "tool": {"content", "name", "tool_call_id"},
}


@dataclass(frozen=True)
class ToolCall:
    """One call that an assistant asks for; UsageError if its name is none."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None

    def __post_init__(self) -> None:
        require_name(self.name, "a tool call")

    def to_json(self) -> dict[str, Any]:
        """The call as OpenAI and the templates have it, its arguments as an object."""
        named = {} if self.id is None else {"id": self.id}
        return {**named, "type": "function", "function": {"name": self.name, "arguments": dict(self.arguments)}}


@dataclass(frozen=True)
class Message:
    """One turn; `reasoning` is what the assistant thought before its content. UsageError for an unknown role."""

    role: str
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        require_role(self.role, "a message")

    def to_json(self) -> dict[str, Any]:
        """The message as the templates read it and as it can be saved; fields without a value are left out."""
        found: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            found["reasoning_content"] = self.reasoning
        if self.tool_calls:
            found["tool_calls"] = [call.to_json() for call in self.tool_calls]
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        return found


def parse_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Messages from JSON, as `Message.to_json` and OpenAI's interface write them.

    Args:
        value: A list of objects with `role` and `content` (a text, null, or a list of text parts).
        where: The file or request, for errors.

    Raises:
        UsageError: The value is something else.
    """
    if not isinstance(value, list):
        raise UsageError(f"{where}: expected a list of messages, found {type(value).__name__}")
    return tuple(_parse_message(message, f"{where}: message {n}") for n, message in enumerate(value, 1))


def parse_tool_call(value: Any, where: str) -> ToolCall:
    """A call from JSON; its arguments are an object, or a text that holds one.

    Raises:
        UsageError: The value is no call.
    """
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict):
        raise UsageError(f'{where}: expected {{"function": {{"name": ..., "arguments": {{...}}}}}}, found {value!r}')
    identity = value.get("id")
    if identity is not None and not isinstance(identity, str):
        raise UsageError(f"{where}: id: expected a text, found {identity!r}")
    name = require_name(function.get("name"), where)
    return ToolCall(name, _arguments(function.get("arguments"), f"{where}: {name}"), identity)


def require_name(name: Any, where: str) -> str:
    """A function's name.

    Raises:
        UsageError: It is none.
    """
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise UsageError(f"{where}: name: expected 1 to 64 letters, digits and _ . - only, found {name!r}")
    return name


def require_role(role: Any, where: str) -> str:
    """A message's role.

    Raises:
        UsageError: It is none.
    """
    if not isinstance(role, str) or role not in ROLES:
        raise UsageError(f"{where}: role: expected one of {', '.join(ROLES)}, found {role!r}")
    return role


def _arguments(value: Any, where: str) -> Mapping[str, Any]:
    try:
        found = json.loads(value) if isinstance(value, str) else {} if value is None else value
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: arguments are not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{where}: arguments: expected an object, found {value!r}")
    return found


def _parse_message(value: Any, where: str) -> Message:
    role = require_role(value.get("role") if isinstance(value, dict) else None, where)
    unknown = sorted(name for name in value.keys() - ROLE_FIELDS[role] - {"role"} if value[name] is not None)
    if unknown:
        raise UsageError(f"{where}: {unknown[0]}: a {role} message has no such field")
    calls = value.get("tool_calls") or []
    if not isinstance(calls, list):
        raise UsageError(f"{where}: tool_calls: expected a list, found {calls!r}")
    reasoning = _text(value, "reasoning_content", where)
    return Message(
        role,
        _content(value.get("content"), where),
        reasoning if reasoning is not None else _text(value, "reasoning", where),
        tuple(parse_tool_call(call, f"{where}: tool call {n}") for n, call in enumerate(calls, 1)),
        _text(value, "tool_call_id", where),
    )


def _content(value: Any, where: str) -> str:
    if value is None or isinstance(value, str):
        return _unicode(value or "", f"{where}: content")
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise UsageError(f"{where}: content: expected a text or a list of text parts")
    return _unicode("".join(part["text"] for part in parts), f"{where}: content")


def _text(value: Mapping[str, Any], name: str, where: str) -> str | None:
    found = value.get(name)
    if found is not None and not isinstance(found, str):
        raise UsageError(f"{where}: {name}: expected a text, found {found!r}")
    return found if found is None else _unicode(found, f"{where}: {name}")


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: half a surrogate pair at character {error.start}: fix the text") from error
    return text
