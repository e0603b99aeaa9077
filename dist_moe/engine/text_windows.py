"""How a text that is longer than a context is cut: into pieces one after the other, or windows that overlap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Tokens [first, stop) of a text, read from nothing; those from `scored` on are predicted and counted."""

    first: int
    scored: int
    stop: int


def windows_of(tokens: int, size: int, stride: int) -> Iterator[Window]:
    """Cut a text into windows that overlap, so that every token but the first is predicted once.

    Each window begins `stride` tokens after the one before it and counts what that did not reach. All but the first
    one's tokens see at least size - stride others (Hugging Face's "perplexity of fixed-length models").

    Args:
        tokens: Of the text.
        size: Most tokens of a window, at least 2.
        stride: At least 1, at most size - 1.
    """
    scored = 1
    for part in _parts(tokens, size, stride):
        if scored < part.stop:
            yield Window(part.start, scored, part.stop)
            scored = part.stop


def pieces_of(ids: list[int], size: int) -> list[list[int]]:
    """Cut a text into pieces of `size` tokens, the last one perhaps shorter; every token is in one of them."""
    return [ids[part.start : part.stop] for part in _parts(len(ids), size, size)]


def _parts(tokens: int, size: int, stride: int) -> Iterator[range]:
    """Runs of `size` tokens, `stride` apart, until one reaches the end."""
    first = stop = 0
    while stop < tokens:
        stop = min(first + size, tokens)
        yield range(first, stop)
        first += stride
