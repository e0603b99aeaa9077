"""Thinking before the answer: soft switches in a message, and a limit on its tokens."""

from __future__ import annotations

import re

from dist_moe.text.tokenizer import Tokenizer

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
# Qwen3's technical report, section 4.3: the model was trained to answer after these words.
EARLY_STOP = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    f"{THINK_CLOSE}\n\n"
)
SOFT_SWITCH = re.compile(r"(?<!\S)/(no_)?think(?!\S)")


def closing_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end thinking early: a sentence that says so, and the closing token."""
    return tuple(tokenizer.encode_trusted(EARLY_STOP))


def soft_switch(text: str) -> bool | None:
    """What a message's last `/think` or `/no_think` asks for; None without one.

    The model reads these words itself: they stay in the message, and thinking must not be switched off by the template.
    """
    found = [match[1] is None for match in SOFT_SWITCH.finditer(text)]
    return found[-1] if found else None


class ThinkingBudget:
    """Tells after each token which ones must come next, so that thinking ends after a number of tokens."""

    def __init__(
        self, tokens: int, open_id: int, close_id: int, closing: tuple[int, ...], *, thinking_is_open: bool
    ) -> None:
        """Begin before the first generated token.

        Args:
            tokens: Most tokens of thinking, the opening and closing tokens not counted.
            open_id: The token that opens thinking.
            close_id: The token that closes it.
            closing: The tokens that end it early.
            thinking_is_open: The prompt ends inside thinking.
        """
        self._left = tokens
        self._open_id, self._close_id, self._closing = open_id, close_id, closing
        self._inside, self._over = thinking_is_open, False

    def start(self) -> tuple[int, ...]:
        """The tokens that must come first; some only if the budget is 0 and the prompt opened thinking."""
        return self._close_if_spent()

    def push(self, token: int) -> tuple[int, ...]:
        """The tokens that must follow a token that the model chose; not to be called for those.

        Returns:
            Mostly nothing; once, when the budget is spent, the closing tokens.
        """
        self._over = self._over or token == self._close_id
        if self._over:
            return ()
        if self._inside:
            self._left -= 1
        else:
            self._inside = token == self._open_id
        return self._close_if_spent()

    def _close_if_spent(self) -> tuple[int, ...]:
        if not self._inside or self._left > 0:
            return ()
        self._over = True
        return self._closing
