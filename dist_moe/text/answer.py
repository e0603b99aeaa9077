"""An answer as it arrives: what the assistant thinks, what it says, and which tools it calls."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from dist_moe.errors import UsageError
from dist_moe.text.markers import THINK_CLOSE, THINK_OPEN, MarkerStream, Span
from dist_moe.text.messages import Message, ToolCall
from dist_moe.text.tokenizer import Tokenizer
from dist_moe.text.tool_calls import CALL_CLOSE, CALL_OPEN, FUNCTION_OPEN, Dialect, is_closed, parse_call
from dist_moe.text.tools import Tool

# Qwen3-Coder at times begins a call with its second tag.
CALL_MARKERS = {
    Dialect.HERMES: (CALL_OPEN, CALL_CLOSE),
    Dialect.CODER: (CALL_OPEN, CALL_CLOSE, FUNCTION_OPEN),
}


@dataclass(frozen=True)
class Delta:
    """What some tokens add to an answer; `notes` say in one sentence each why a call stayed text."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[ToolCall, ...] = ()
    notes: tuple[str, ...] = ()

    def __add__(self, other: Delta) -> Delta:
        return Delta(
            self.reasoning + other.reasoning,
            self.content + other.content,
            self.calls + other.calls,
            self.notes + other.notes,
        )


class Part(enum.Enum):
    """Where in an answer the next text belongs."""

    START = enum.auto()
    REASONING = enum.auto()
    CONTENT = enum.auto()
    CALL = enum.auto()


class AnswerStream:
    """Splits one answer's tokens.

    Newlines around thinking and before and after calls belong to the frame and are left out. A call is held back until
    it is whole; one that cannot be parsed, or that the text's end cuts off, comes as text with a note.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, thinking_is_open: bool, dialect: Dialect | None, tools: Sequence[Tool] = ()
    ) -> None:
        """Begin before the first token; `ChatFormat.answer` does it for a prompt.

        Args:
            tokenizer: The model's.
            thinking_is_open: The prompt ends inside thinking.
            dialect: How the model writes calls.
            tools: What it may call; without any, calls are text.
        """
        self._dialect, self._tools = dialect, tuple(tools)
        calls = CALL_MARKERS[dialect] if dialect is not None and tools else ()
        self._markers = MarkerStream(tokenizer, (THINK_OPEN, THINK_CLOSE, *calls))
        self._part = Part.REASONING if thinking_is_open else Part.START
        self._newlines = ""  # held back: they count only if more text of the same part follows
        self._part_is_empty = True
        self._opening, self._body = "", ""
        self._thought = thinking_is_open
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[ToolCall] = []

    @property
    def is_thinking(self) -> bool:
        """Whether the next text is thinking."""
        return self._part is Part.REASONING

    @property
    def message(self) -> Message:
        """The answer so far, to be put into the conversation after `finish`."""
        reasoning = "".join(self._reasoning) if self._thought else None
        return Message("assistant", "".join(self._content), reasoning, tuple(self._calls))

    def push(self, token: int) -> Delta:
        """What this token completes."""
        return self._take(self._markers.push(token))

    def finish(self) -> Delta:
        """What was held back, now that the answer has ended."""
        found = self._take(self._markers.finish())
        rest = Delta()
        if self._part is Part.CALL:
            rest = self._end_call("")
        elif self._part is Part.CONTENT and not self._calls and not self._part_is_empty:
            rest = Delta(content=self._newlines)
        self._newlines = ""
        return found + self._keep(rest)

    def _take(self, spans: Sequence[Span]) -> Delta:
        found = Delta()
        for span in spans:
            found += self._marker(span.text) if span.marker else self._text(span.text)
        return self._keep(found)

    def _keep(self, delta: Delta) -> Delta:
        self._reasoning.append(delta.reasoning)
        self._content.append(delta.content)
        self._calls += delta.calls
        return delta

    def _marker(self, marker: str) -> Delta:
        if self._part is Part.CALL:
            if marker == CALL_CLOSE:
                return self._end_call(CALL_CLOSE)
            self._body += marker
            return Delta()
        if marker == THINK_OPEN and self._part is Part.START:
            self._thought = True
            return self._enter(Part.REASONING)
        if marker == THINK_CLOSE and self._part in (Part.START, Part.REASONING):
            return self._enter(Part.CONTENT)
        if marker in (CALL_OPEN, FUNCTION_OPEN):
            before = self._newlines if self._part is Part.CONTENT else ""
            self._enter(Part.CALL)
            self._opening, self._body = (before + marker, "") if marker == CALL_OPEN else (before, marker)
            return Delta()
        return self._text(marker)  # out of place, so it is what the model says

    def _text(self, text: str) -> Delta:
        if self._part is Part.CALL:
            self._body += text
            return Delta()
        if self._part is Part.START:
            if not text.strip():
                self._newlines += text
                return Delta()
            self._part, text, self._newlines = Part.CONTENT, self._newlines + text, ""
            self._part_is_empty = False
        if self._part_is_empty:
            text = text.lstrip("\n")
        if not text:
            return Delta()
        if self._part_is_empty and self._calls and any(self._content):
            self._newlines = "\n"  # what is said before and after a call is one content
        self._part_is_empty = False
        text = self._newlines + text
        kept = text.rstrip("\n")
        self._newlines = text[len(kept) :]
        return Delta(reasoning=kept) if self._part is Part.REASONING else Delta(content=kept)

    def _enter(self, part: Part) -> Delta:
        self._part, self._newlines, self._body, self._part_is_empty = part, "", "", True
        return Delta()

    def _end_call(self, closing: str) -> Delta:
        body, text = self._body, self._opening + self._body + closing
        self._enter(Part.CONTENT)
        assert self._dialect is not None
        try:
            call = parse_call(body, self._dialect, self._tools)
            if not closing and not is_closed(body, self._dialect):
                raise UsageError("the answer ended before </tool_call>")
        except UsageError as error:
            self._part_is_empty = False
            return Delta(content=text, notes=(f"a tool call was kept as text: {error}",))
        return Delta(calls=(call,))
