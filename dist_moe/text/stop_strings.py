"""Texts that end a generation: found across the borders of tokens, and never shown, not even their beginning."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class _Node:
    """A beginning of some stop strings: `longest` is the longest of them that ends here."""

    depth: int
    next: dict[str, _Node] = field(default_factory=dict)
    fallback: _Node | None = None  # the longest beginning that this one ends with
    longest: str = ""


class StopStrings:
    """Watches one text grow (Aho and Corasick's automaton: a few steps per character, however many strings).

    The text ends before the stop string that is complete first; of several that are complete at the same character,
    before the longest. So the same characters give the same text, however they arrive.

    Attributes:
        found: The stop string that ended the text, or None.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Prepare for strings of at least one character each; none at all let every text pass."""
        self._root = _build(strings)
        self._at = self._root
        self._held = ""  # always as long as the node is deep
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take what the text grows by.

        Returns:
            What can be shown now: all but what may yet be the beginning of a stop string.
        """
        if self.found is not None:
            return ""
        text, fresh = self._held + text, len(self._held)
        for end, character in enumerate(text[fresh:], fresh + 1):
            self._at = self._step(character)
            if self._at.longest:
                self.found, self._held = self._at.longest, ""
                return text[: end - len(self.found)]
        shown = len(text) - self._at.depth
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back, now that the text has ended."""
        held, self._held, self._at = self._held, "", self._root
        return held

    def _step(self, character: str) -> _Node:
        node: _Node | None = self._at
        while node is not None:
            if character in node.next:
                return node.next[character]
            node = node.fallback
        return self._root


def _build(strings: Sequence[str]) -> _Node:
    assert all(strings), "an empty stop string would end every text"
    root = _Node(0)
    for string in strings:
        node = root
        for character in string:
            node = node.next.setdefault(character, _Node(node.depth + 1))
        node.longest = string
    queue = deque([root])
    while queue:
        node = queue.popleft()
        for character, child in node.next.items():
            child.fallback = _fallback(node, character, root)
            child.longest = child.longest or child.fallback.longest
            queue.append(child)
    return root


def _fallback(parent: _Node, character: str, root: _Node) -> _Node:
    node = parent.fallback
    while node is not None:
        if character in node.next:
            return node.next[character]
        node = node.fallback
    return root
