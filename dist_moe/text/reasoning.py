"""Thinking before the answer: a limit on its tokens."""

from __future__ import annotations

from dist_moe.text.answer import AnswerStream
from dist_moe.text.markers import THINK_CLOSE
from dist_moe.text.tokenizer import Tokenizer

# Qwen3's technical report, section 4.3: the model was trained to answer after these words.
EARLY_STOP = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    f"{THINK_CLOSE}\n\n"
)


def closing_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end thinking early: a sentence that says so, and the closing token."""
    return tuple(tokenizer.encode_trusted(EARLY_STOP))


class ThinkingBudget:
    """Tells after each token which ones must come next, so that thinking ends after a number of tokens."""

    def __init__(self, tokens: int, closing: tuple[int, ...], answer: AnswerStream) -> None:
        """Begin before the first token; `ChatFormat.thinking_budget` does it for a prompt.

        Args:
            tokens: Most tokens of thinking, those that open and close it not counted.
            closing: The tokens that end it early (`closing_ids`).
            answer: A stream of its own, which knows where the answer is thinking.
        """
        self._left, self._closing, self._answer = tokens, closing, answer

    def start(self) -> tuple[int, ...]:
        """The tokens that must come first; some only if the budget is 0 and the prompt opened thinking."""
        return self._close_if_spent()

    def push(self, token: int) -> tuple[int, ...]:
        """The tokens that must follow one that the model chose: mostly none, once the closing ones."""
        before = self._answer.is_thinking
        self._answer.push(token)
        self._left -= before and self._answer.is_thinking
        return self._close_if_spent()

    def _close_if_spent(self) -> tuple[int, ...]:
        if not self._answer.is_thinking or self._left > 0:
            return ()
        for token in self._closing:
            self._answer.push(token)
        return self._closing
