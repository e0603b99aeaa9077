"""Markup in generated tokens: by token where the tokenizer has one for it, else by its text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dist_moe.text.tokenizer import Tokenizer

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Span:
    """A stretch of generated text; a `marker` is markup, whole and by itself."""

    text: str
    marker: bool = False


class MarkerStream:
    """Cuts one sequence's tokens into text and markup.

    A marker that is a token of its own is recognized by its id alone: the same characters made of other tokens are
    text. Others are found in the text, whose end is held back while a marker could begin there.
    """

    def __init__(self, tokenizer: Tokenizer, markers: Collection[str]) -> None:
        """Begin before the first token.

        Args:
            tokenizer: The model's.
            markers: The markup, such as `</think>`.
        """
        self._by_id = {tokenizer.added_tokens[text]: text for text in markers if text in tokenizer.added_tokens}
        self._by_text = [text for text in markers if text not in tokenizer.added_tokens]
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()
        self._held = ""

    def push(self, token: int) -> list[Span]:
        """What this token completes, in order."""
        marker = self._by_id.get(token)
        if marker is None:
            return self._cut(self._stream.push(token))
        return [*self.finish(), Span(marker, marker=True)]

    def finish(self) -> list[Span]:
        """What was held back, now that nothing follows."""
        text = self._stream.finish()
        self._stream = self._tokenizer.stream()
        found = self._cut(text)
        rest, self._held = self._held, ""
        return [*found, Span(rest)] if rest else found

    def _cut(self, text: str) -> list[Span]:
        found, rest = [], self._held + text
        while (place := min(((rest.find(m), m) for m in self._by_text if m in rest), default=None)) is not None:
            start, marker = place
            found += [Span(rest[:start]), Span(marker, marker=True)]
            rest = rest[start + len(marker) :]
        held = max((unfinished(rest, marker) for marker in self._by_text), default=0)
        self._held = rest[len(rest) - held :]
        return [span for span in [*found, Span(rest[: len(rest) - held])] if span.text]


def unfinished(text: str, marker: str) -> int:
    """How many characters at the end of a text a marker could begin with."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if marker.startswith(text[-n:])), 0)
