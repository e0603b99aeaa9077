"""One chat with the user: messages and commands in, answers out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dist_moe.chat.commands import Call, help_lines, parse_line, parse_thinking
from dist_moe.chat.conversation import Conversation, load_conversation, to_wire
from dist_moe.chat.display import Display
from dist_moe.chat.protocol import Done, Generate, Note, Piece, Ready, Refused
from dist_moe.chat.reader import Reader
from dist_moe.engine.start.settings import LARGEST_SEED
from dist_moe.errors import UsageError
from dist_moe.text.messages import Message, ToolCall, parse_messages
from dist_moe.text.tools import Tool, read_tools

Show = Callable[[Piece | Note], None]
_MARK = "> "


class Backend(Protocol):
    """Who answers."""

    def answer(self, request: Generate, show: Show) -> Done | Refused:
        """Continue a conversation, showing the answer as it grows; Ctrl-C ends it early."""


@dataclass
class Settings:
    """What the user can change while the chat runs; `thinking` as the protocol has it."""

    thinking: str = "auto"
    seed: int = 0
    tools: tuple[Tool, ...] = ()


@dataclass
class Chat:
    """Reads, obeys and asks until the user leaves."""

    backend: Backend
    reader: Reader
    display: Display
    facts: Ready
    settings: Settings
    conversation: Conversation = field(default_factory=Conversation)
    _retries: int = 0
    _last: Done | None = None
    _leaving: bool = False

    def run(self) -> None:
        """Hold the conversation; returns at the end of input, at /exit, and at a second Ctrl-C on an empty line."""
        self._greet()
        hinted = False
        while not self._leaving:
            try:
                text = self.reader.read(_MARK)
            except EOFError:
                return
            except KeyboardInterrupt:
                if hinted or not self.reader.is_interactive:
                    if self.reader.is_interactive:
                        return
                    raise
                self.display.say("Ctrl-C again or Ctrl-D leaves; /help lists the commands")
                hinted = True
                continue
            hinted = False
            self.take(text)

    def take(self, text: str) -> None:
        """Obey or answer one message; what cannot be done is said, and the chat goes on."""
        if not text.strip():
            return
        try:
            line = parse_line(text)
            if isinstance(line, Call):
                getattr(self, f"_do_{line.name}")(line.argument)
            else:
                self._send(line)
        except UsageError as error:
            self.display.complain(str(error))

    # ---- commands ----

    def _do_help(self, _: str) -> None:
        self.display.say("\n".join(help_lines()))

    def _do_exit(self, _: str) -> None:
        self._leaving = True

    def _do_clear(self, _: str) -> None:
        self.conversation.clear()
        self.display.say(
            "the conversation is empty" + (", the system prompt stays" if self.conversation.system else "")
        )

    def _do_undo(self, _: str) -> None:
        text = self.conversation.undo()
        if text is None:
            raise UsageError("/undo: there is no message to take back")
        self.display.say(f"taken back: {_shorten(text)}")

    def _do_retry(self, _: str) -> None:
        kept = list(self.conversation.messages)
        if not self.conversation.turns:
            raise UsageError("/retry: there is no message to answer")
        if self.conversation.forget_answer():
            self._retries += 1
        same = ": at temperature 0 the answer stays the same" if self.facts.temperature == 0 else ""
        self.display.say(f"seed {self._seed()}{same}")
        self._answer(kept)

    def _do_save(self, name: str) -> None:
        path = _path(name)
        self.conversation.save(path)
        self.display.say(f"saved {_count(self.conversation.turns, 'turn')} in {path}")

    def _do_load(self, name: str) -> None:
        path = _path(name)
        self.conversation = load_conversation(path, "/load")
        self._retries = 0
        self.display.say(f"loaded {_count(self.conversation.turns, 'turn')} from {path}")

    def _do_system(self, text: str) -> None:
        if text:
            self.conversation.system = "" if text == "-" else text
        system = self.conversation.system
        self.display.say(f"system prompt: {system}" if system else "there is no system prompt")

    def _do_think(self, text: str) -> None:
        self._set_thinking("on")
        if text:
            self._send(text)

    def _do_no_think(self, text: str) -> None:
        self._set_thinking("off")
        if text:
            self._send(text)

    def _do_thinking(self, text: str) -> None:
        if text in ("show", "hide"):
            self.display.show_thinking = text == "show"
            self.display.say(f"thinking is {'shown' if self.display.show_thinking else 'hidden'}")
        elif text:
            self._set_thinking(parse_thinking(text, "/thinking"))
        else:
            self.display.say(f"thinking: {_describe_thinking(self.settings.thinking)}")

    def _do_tools(self, name: str) -> None:
        if name and name != "off" and not self.facts.knows_tools:
            raise UsageError("/tools: this model's chat template knows no tool calls")
        if name:
            self.settings.tools = () if name == "off" else read_tools(_path(name), "/tools")
        lines = [f"{tool.name}: {tool.definition['function'].get('description', '')}" for tool in self.settings.tools]
        self.display.say("\n".join(lines) or "there are no tools; /tools FILE reads some")

    def _do_stats(self, _: str) -> None:
        if self._last is None:
            raise UsageError("/stats: there is no answer yet")
        self.display.say(describe_answer(self._last, self.facts))

    # ---- answers ----

    def _send(self, text: str) -> None:
        kept = list(self.conversation.messages)
        self.conversation.add(Message("user", text))
        self._retries = 0
        self._answer(kept)

    def _answer(self, kept: list[Message]) -> None:
        """Answer the last message; if nothing comes of it, the conversation is `kept` as it was."""
        while True:
            found = self.backend.answer(self._request(), self._show)
            self.display.end_answer()
            if isinstance(found, Refused):
                self.conversation.messages = kept
                raise UsageError(found.reason)
            self._last = found
            (message,) = parse_messages([found.message], "the answer")
            self.conversation.add(message)
            self._tell_end(found)
            if not message.tool_calls or found.finish_reason != "stop" or not self._answer_calls(message.tool_calls):
                return

    def _request(self) -> Generate:
        tools = [dict(tool.definition) for tool in self.settings.tools]
        return Generate(to_wire(self.conversation.messages), tools, self.settings.thinking, self._seed())

    def _seed(self) -> int:
        return (self.settings.seed + self._retries) % (LARGEST_SEED + 1)

    def _show(self, found: Piece | Note) -> None:
        if isinstance(found, Piece):
            self.display.piece(found.text, found.kind)
        else:
            self.display.say(found.text)

    def _tell_end(self, found: Done) -> None:
        if found.finish_reason == "error":
            self.display.complain(f"the answer ended early: {found.error}")
        elif found.finish_reason == "length":
            self.display.say(f"(cut after {found.completion_tokens} tokens: --max-tokens)")
        elif found.finish_reason == "context":
            self.display.say(
                f"(cut after {found.completion_tokens} tokens: the context of {self.facts.context} is full)"
            )
        elif found.finish_reason == "interrupted":
            self.display.say(f"(stopped after {found.completion_tokens} tokens)")

    def _answer_calls(self, calls: tuple[ToolCall, ...]) -> bool:
        """Ask the user for every call's result; whether there is something to go on with."""
        for call in calls:
            self.display.call(f"call {call.name} {json.dumps(dict(call.arguments), ensure_ascii=False)}")
        results: list[Message] = []
        for call in calls:
            result = self._read_result(call)
            if result is None:
                self.display.say("without a result the call stays unanswered; /undo takes the turn back")
                return False
            results.append(Message("tool", result, tool_call_id=call.id))
        self.conversation.add(*results)
        return True

    def _read_result(self, call: ToolCall) -> str | None:
        while True:
            try:
                text = self.reader.read(f"result of {call.name} (text or @FILE)> ")
            except (EOFError, KeyboardInterrupt):
                return None
            if not text.startswith("@"):
                return text
            try:
                return _path(text[1:].strip()).read_text(encoding="utf-8")
            except (OSError, ValueError, UsageError) as error:
                self.display.complain(f"{text}: cannot be read as text: {getattr(error, 'strerror', None) or error}")

    # ---- small things ----

    def _greet(self) -> None:
        if not self.reader.is_interactive:
            return
        what = f"{self.facts.model}, {_count(self.facts.ranks, 'rank')}, context {self.facts.context}"
        self.display.say(f"{what}; /help lists the commands")
        if self.conversation.turns:
            self.display.say(f"the conversation has {_count(self.conversation.turns, 'turn')}")

    def _set_thinking(self, wish: str) -> None:
        if wish not in ("auto", "off") and self.facts.thinking == "never":
            raise UsageError("this model does not think: its chat template has no enable_thinking")
        if wish == "off" and self.facts.thinking == "always":
            raise UsageError("this model always thinks: its chat template has no enable_thinking")
        self.settings.thinking = wish
        self.display.say(f"thinking: {_describe_thinking(wish)}")


def describe_answer(done: Done, facts: Ready) -> str:
    """An answer in numbers, in one line."""
    prefilled = done.prompt_tokens - done.reused_tokens
    used = done.prompt_tokens + done.completion_tokens
    return (
        f"prompt {done.prompt_tokens} tokens, {done.reused_tokens} reused, {prefilled} computed at "
        f"{_rate(prefilled, done.prefill_s):.1f} tokens/s | answer {done.completion_tokens} tokens at "
        f"{_rate(done.completion_tokens - 1, done.decode_s):.1f} tokens/s, {done.finish_reason} | "
        f"context {used} of {facts.context}"
    )


def _describe_thinking(wish: str) -> str:
    return f"at most {wish} tokens" if wish.isdecimal() else wish


def _path(name: str) -> Path:
    """A file as the user names it, ~ included."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{name}: there is no such user, or no home directory: write the path out") from error


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 and tokens > 0 else 0.0


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
