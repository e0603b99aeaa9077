"""The conversation that a chat holds: its messages, undoing, and its file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_moe.errors import UsageError
from dist_moe.files import NewFile
from dist_moe.text.messages import Message, parse_messages

FILE_VERSION = 1
_FIELDS = {"dist_moe_chat", "messages"}


@dataclass
class Conversation:
    """Messages, oldest first; `system` is the first one's content where that is a system prompt, else ""."""

    messages: list[Message] = field(default_factory=list)

    @property
    def system(self) -> str:
        """The system prompt, or ""."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else ""

    @system.setter
    def system(self, text: str) -> None:
        rest = [message for message in self.messages if message.role != "system"]
        self.messages = [Message("system", text), *rest] if text else rest

    @property
    def turns(self) -> int:
        """How many messages are the user's."""
        return sum(message.role == "user" for message in self.messages)

    def add(self, *messages: Message) -> None:
        """Append."""
        self.messages += messages

    def undo(self) -> str | None:
        """Forget the user's last message and all that followed.

        Returns:
            That message; None if there is none.
        """
        place = self._last_user()
        if place is None:
            return None
        text = self.messages[place].content
        del self.messages[place:]
        return text

    def forget_answer(self) -> bool:
        """Forget all that followed the user's last message; whether there was anything."""
        place = self._last_user()
        if place is None or place + 1 == len(self.messages):
            return False
        del self.messages[place + 1 :]
        return True

    def clear(self) -> None:
        """Forget all but the system prompt."""
        del self.messages[1 if self.system else 0 :]

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, readable by its owner alone; an older file is replaced as a whole.

        Raises:
            UsageError: It cannot be written, or a directory or device stands there.
        """
        value = {"dist_moe_chat": FILE_VERSION, "messages": [message.to_json() for message in self.messages]}
        text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{path}: cannot be written: a message holds half a surrogate pair: /undo it") from error
        with NewFile(path, private=True) as file:
            file.write(data)
            file.commit()

    def _last_user(self) -> int | None:
        places = [place for place, message in enumerate(self.messages) if message.role == "user"]
        return places[-1] if places else None


def load_conversation(path: Path, where: str) -> Conversation:
    """The conversation in a file that `save` wrote.

    Args:
        path: The file.
        where: The option or command that named it, for errors.

    Raises:
        UsageError: It cannot be read, is no conversation, or one of a later version.
    """
    origin = f"{where} {path}"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{origin}: cannot be read ({error.strerror or error}): check the name") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{origin}: is not JSON, as /save writes it: {error}") from error
    version = value.get("dist_moe_chat") if isinstance(value, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise UsageError(f'{origin}: is no conversation: expected {{"dist_moe_chat": {FILE_VERSION}, "messages": ...}}')
    if version != FILE_VERSION:
        raise UsageError(f"{origin}: has format {version}, this dist-moe reads {FILE_VERSION}: use what wrote it")
    if unknown := sorted(value.keys() - _FIELDS):
        raise UsageError(f"{origin}: unknown field {unknown[0]!r}: expected dist_moe_chat and messages")
    messages = parse_messages(value.get("messages"), origin)
    _check_order(messages, origin)
    return Conversation(list(messages))


def _check_order(messages: Sequence[Message], origin: str) -> None:
    """A system prompt stands first, and what follows begins with the user."""
    roles = [message.role for message in messages]
    body = roles[1:] if roles[:1] == ["system"] else roles
    if "system" in body:
        raise UsageError(f"{origin}: message {roles.index('system', 1) + 1}: a system prompt can only come first")
    if body and body[0] != "user":
        raise UsageError(f"{origin}: the conversation begins with {body[0]!r}: expected a message of the user")


def to_wire(messages: Sequence[Message]) -> list[Any]:
    """Messages as the protocol carries them."""
    return [message.to_json() for message in messages]
