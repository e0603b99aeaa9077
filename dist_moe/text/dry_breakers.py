"""Which tokens contain a text: DRY sees no repetition that reaches over one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dist_moe.text.tokenizer import Tokenizer


def breaker_tokens(tokenizer: Tokenizer, breakers: Iterable[str]) -> frozenset[tuple[int, ...]]:
    """The token sequences that a text's occurrence may end in, of each of some texts.

    One token that contains it, or one whose end begins it, followed by the tokens of what remains (as llama.cpp's
    `get_overlapping_token_sequences`).

    Args:
        tokenizer: The model's.
        breakers: Texts; empty ones break nothing.
    """
    wanted = [breaker.encode() for breaker in breakers if breaker]
    return frozenset(
        found
        for token in range(tokenizer.size)
        for breaker in wanted
        for found in _sequences(tokenizer, token, tokenizer.token_bytes(token), breaker)
    )


def _sequences(tokenizer: Tokenizer, token: int, content: bytes, breaker: bytes) -> Iterator[tuple[int, ...]]:
    if breaker in content:
        yield (token,)
        return
    for length in range(1, len(breaker)):
        if content.endswith(breaker[:length]):
            rest = breaker[length:].decode(errors="replace")
            if "\ufffd" not in rest:  # else the token ends inside a character
                ids = tokenizer.encode(rest)
                yield (token, *(ids[1:] if ids[:1] == [tokenizer.bos_id] else ids))
