"""`--show-tokens`: tokens one by one, as ids and as the escaped bytes that they stand for."""

from __future__ import annotations

from dist_moe.text.tokenizer import Tokenizer

_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
_FIRST_LONE_BYTE = 0xDC00  # how `surrogateescape` writes a byte that is no part of a character


def token_line(tokenizer: Tokenizer | None, token: int) -> str:
    r"""`[id] -> "piece"`; the id alone without a tokenizer.

    What cannot be printed is escaped as in Python: a lone byte of a character as `\xNN`, others as `\n` or `\uNNNN`.
    """
    if tokenizer is None:
        return f"[{token}]"
    content = tokenizer.special_text(token)
    text = content if content is not None else tokenizer.token_bytes(token).decode("utf-8", "surrogateescape")
    return f'[{token}] -> "{"".join(map(_escaped, text))}"'


def _escaped(character: str) -> str:
    code = ord(character)
    if _FIRST_LONE_BYTE <= code < _FIRST_LONE_BYTE + 0x100:
        return f"\\x{code - _FIRST_LONE_BYTE:02x}"
    if character in _ESCAPES:
        return _ESCAPES[character]
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
