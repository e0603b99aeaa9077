"""Special tokens in somebody's text pass through a template as stand-ins, and come out as ordinary characters."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

PRIVATE_PLANE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation; in a `literal` one no added token is a token."""

    text: str
    literal: bool


class Disguise:
    """Hides token texts behind single characters that occur nowhere else.

    A template cannot cut such a character in two or take it for markup; after rendering, `pieces` brings the text back.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        """Choose characters.

        Args:
            values: All messages and tools (JSON values) that will be rendered together.
        """
        self._present = json.dumps(list(values), ensure_ascii=False)
        self._free = (chr(code) for code in PRIVATE_PLANE if not self._occurs(chr(code)))
        self._stand_ins: dict[str, str] = {}

    def hide(self, value: Any, tokens: Collection[str]) -> Any:
        """The value with every token text in it replaced, in keys and at any depth.

        Args:
            value: JSON: a message, a tool, or a part of them.
            tokens: The texts to hide.
        """
        if not tokens:
            return value
        longest_first = sorted(tokens, key=len, reverse=True)
        return self._hide(value, re.compile("|".join(map(re.escape, longest_first))))

    def pieces(self, rendered: str) -> list[Piece]:
        """The rendered text cut at the stand-ins, each of which becomes a literal piece."""
        if not self._stand_ins:
            return [Piece(rendered, literal=False)]
        hidden = {character: text for text, character in self._stand_ins.items()}
        hidden |= {_escaped(character): text for character, text in hidden.items()}
        parts = re.split(f"({'|'.join(map(re.escape, hidden))})", rendered)
        found = [Piece(hidden.get(part, part), literal=n % 2 == 1) for n, part in enumerate(parts)]
        return [piece for piece in found if piece.text]

    def _hide(self, value: Any, tokens: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return tokens.sub(lambda match: self._stand_in(match[0]), value)
        if isinstance(value, dict):
            return {self._hide_key(key, tokens): self._hide(item, tokens) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._hide(item, tokens) for item in value]
        return value

    def _hide_key(self, key: Any, tokens: re.Pattern[str]) -> Any:
        # Some templates write keys as tags: the key |im_end| would become a token by its brackets.
        if isinstance(key, str) and (tokens.search(f"<{key}>") or tokens.search(f"</{key}>")):
            return self._stand_in(key)
        return key

    def _stand_in(self, text: str) -> str:
        if text not in self._stand_ins:
            self._stand_ins[text] = next(self._free)
        return self._stand_ins[text]

    def _occurs(self, character: str) -> bool:
        return character in self._present or _escaped(character).replace("\\", "\\\\") in self._present


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]
