"""Incremental decoding: tokens become text as they arrive, cut only at whole characters."""

from __future__ import annotations

import codecs
from collections.abc import Callable

TokenBytes = Callable[[int], bytes]


def byte_level_alphabet() -> dict[str, int]:
    """Which byte each character of a byte-level BPE token stands for (the GPT-2 table).

    Printable bytes stand for themselves; the other 68 follow from U+0100 on, in ascending order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


class TextStream:
    """Turns one sequence's tokens into text, at a cost per token that does not grow with the sequence.

    A token may end inside a character. Its bytes wait until the character is whole or cannot become so; then it is
    emitted as the character or as U+FFFD, exactly as decoding all tokens at once would give.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        """Start an empty text.

        Args:
            token_bytes: The bytes that a token stands for (`Tokenizer.token_bytes`).
        """
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes; often one word, sometimes none."""
        return self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        """What an unfinished character at the end of the text leaves: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)
