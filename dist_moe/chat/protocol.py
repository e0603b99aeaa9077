"""What front end and back end say to each other: a JSON object a line, the fields of one class and its `type`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

from dist_moe.errors import DistMoeError

PROTOCOL_VERSION = 1
# A conversation as long as a context of a million tokens is below this; what is longer is no message of ours.
LARGEST_LINE_BYTES = 64 << 20

PieceKind = Literal["reasoning", "answer"]
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "list[Any]": (list,),
    "dict[str, Any]": (dict,),
    "PieceKind": (str,),
}


class ProtocolError(DistMoeError):
    """The other end says something that this version of the protocol does not know (exit code 3)."""

    exit_code = 3


@dataclass(frozen=True)
class Hello:
    """The first message of either end; the token shows that it belongs to this chat."""

    name: ClassVar[str] = "hello"
    version: int
    token: str


@dataclass(frozen=True)
class Ready:
    """Back end: the model is loaded. `thinking` is a `text.chat.Thinking`; `context` is in positions."""

    name: ClassVar[str] = "ready"
    model: str
    ranks: int
    context: int
    thinking: str
    knows_tools: bool
    temperature: float


@dataclass(frozen=True)
class Generate:
    """Front end: continue this conversation; answered by pieces and `Done`, or by `Refused`.

    Attributes:
        messages: Oldest first, each as `text.messages.Message.to_json` gives it.
        tools: Definitions of functions in OpenAI's form.
        thinking: auto, on, off, or the most tokens of thinking.
        seed: Of the random numbers.
    """

    name: ClassVar[str] = "generate"
    messages: list[Any]
    tools: list[Any]
    thinking: str
    seed: int


@dataclass(frozen=True)
class Stop:
    """Front end: end the answer that is being made; it comes with `Done` all the same."""

    name: ClassVar[str] = "stop"


@dataclass(frozen=True)
class Quit:
    """Front end: end the job."""

    name: ClassVar[str] = "quit"


@dataclass(frozen=True)
class Piece:
    """Back end: what some tokens add to the answer."""

    name: ClassVar[str] = "piece"
    text: str
    kind: PieceKind


@dataclass(frozen=True)
class Note:
    """Back end: a sentence for the user about the answer, which is no part of it."""

    name: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True)
class Done:
    """Back end: the answer is complete.

    Attributes:
        message: To be put into the conversation, as `text.messages.Message.to_json` gives it; with its tool calls.
        finish_reason: As `engine.request.Completion` has it.
        error: What went wrong in the model, or "".
        prompt_tokens: Of the whole conversation; `reused_tokens` of them were not computed anew.
        completion_tokens: Of the answer and its thinking.
        prefill_s: Seconds in steps with tokens of the prompt; `decode_s` in all others.
    """

    name: ClassVar[str] = "done"
    message: dict[str, Any]
    finish_reason: str
    error: str
    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int
    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class Refused:
    """Back end: nothing was generated, and why; the chat goes on."""

    name: ClassVar[str] = "refused"
    reason: str


ChatMessage = Hello | Ready | Generate | Stop | Quit | Piece | Note | Done | Refused
_CLASSES: dict[str, type[ChatMessage]] = {
    kind.name: kind for kind in (Hello, Ready, Generate, Stop, Quit, Piece, Note, Done, Refused)
}


def encode(message: ChatMessage) -> bytes:
    """The message as one line."""
    return json.dumps({"type": message.name, **asdict(message)}, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> ChatMessage:
    """The message in a line.

    Raises:
        ProtocolError: The line is none, or one of another version.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"chat protocol: a line is not JSON: {error}") from error
    name = value.get("type") if isinstance(value, dict) else None
    kind = _CLASSES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ProtocolError(f"chat protocol: unknown message {_short(value)}: {_advice()}")
    del value["type"]
    _check_fields(kind, value)
    return kind(**value)


def _check_fields(kind: type[ChatMessage], value: Mapping[str, Any]) -> None:
    expected = {field.name: str(field.type) for field in fields(kind)}
    if expected.keys() != value.keys():
        odd = ", ".join(sorted(expected.keys() ^ value.keys()))
        raise ProtocolError(f"chat protocol: {kind.name}: missing or unknown fields {odd}: {_advice()}")
    for field, declared in expected.items():
        found = value[field]
        if not isinstance(found, _KINDS[declared]) or (isinstance(found, bool) and declared != "bool"):
            raise ProtocolError(f"chat protocol: {kind.name}: {field}: expected {declared}, found {_short(found)}")


def _advice() -> str:
    return f"install the same version of dist-moe everywhere (this one speaks protocol {PROTOCOL_VERSION})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
