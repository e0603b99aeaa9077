"""A model's own byte-level BPE tokenizer, read from the files beside its weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from dist_moe import files
from dist_moe.errors import CheckpointError, UsageError
from dist_moe.text.disguise import Piece
from dist_moe.text.json_file import read_json_object
from dist_moe.text.stream import TextStream, byte_level_alphabet

TOKENIZER_FILE = "tokenizer.json"
NAMED_TOKENS = ("bos", "eos", "pad", "unk")


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, directory: Path) -> None:
        """Read `tokenizer.json` and `tokenizer_config.json`.

        Args:
            directory: A model's directory or a store.

        Raises:
            CheckpointError: A file is missing, damaged, or describes another kind of tokenizer.
        """
        path = directory / TOKENIZER_FILE
        self._backend = _read_backend(path)
        settings = read_json_object(directory / "tokenizer_config.json")
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token for token, content in added.items() if content.special)
        self._added_ids = frozenset(added)
        self._origin = path
        self.added_tokens = {content.content: token for token, content in added.items()}
        self.special_tokens = frozenset(content.content for content in added.values() if content.special)
        self._literal_backend = _without_added_tokens(self._backend)
        self._byte_of_character = byte_level_alphabet()
        self.size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = self._named_token(settings.get("bos_token"))
        self.eos_id = self._named_token(settings.get("eos_token"))
        self._adds_bos = bool(settings.get("add_bos_token")) and self.bos_id is not None
        named = {f"{name}_token": _token_text(settings.get(f"{name}_token")) for name in NAMED_TOKENS}
        self.named_tokens = {name: text for name, text in named.items() if text is not None}

    def encode(self, text: str) -> list[int]:
        """The ids of a plain text; `<|im_end|>` and other special tokens in it are ordinary characters.

        Raises:
            UsageError: The text holds half a surrogate pair: it was not UTF-8.
        """
        return self._encode(text, special_as_text=True)

    def encode_trusted(self, text: str) -> list[int]:
        """The ids of a text made by us (a rendered chat frame), in which special tokens are tokens.

        Raises:
            UsageError: The text holds half a surrogate pair: it was not UTF-8.
        """
        return self._encode(text, special_as_text=False)

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """The ids of a rendered conversation: no token is put before it, and in literal pieces none is a token.

        Raises:
            UsageError: The text holds half a surrogate pair: it was not UTF-8.
            CheckpointError: The tokenizer makes an added token of ordinary characters.
        """
        ids: list[int] = []
        for piece in pieces:
            _require_unicode(piece.text)
            backend = self._literal_backend if piece.literal else self._backend
            backend.encode_special_tokens = False
            found = backend.encode(piece.text, add_special_tokens=False).ids
            if piece.literal and not self._added_ids.isdisjoint(found):
                raise CheckpointError(
                    f"{self._origin}: makes a token of {piece.text!r} in ordinary text, which forges it"
                )
            ids += found
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens, special ones left out and broken characters as U+FFFD."""
        stream = self.stream()
        return "".join([*map(stream.push, ids), stream.finish()])

    def stream(self) -> TextStream:
        """A decoder that takes one token at a time."""
        return TextStream(self.token_bytes)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for special tokens and for ids beyond the tokenizer."""
        is_text = 0 <= token < self.size and token not in self._special_ids
        content = self._backend.id_to_token(token) if is_text else None
        if content is None:
            return b""
        try:
            return bytes(self._byte_of_character[character] for character in content)
        except KeyError:  # an added token: literal text outside the byte-level alphabet
            return content.encode()

    def special_text(self, token: int) -> str | None:
        """How a special token is written, such as `<|im_end|>`; None for any other."""
        text: str | None = self._backend.id_to_token(token) if token in self._special_ids else None
        return text

    def _encode(self, text: str, *, special_as_text: bool) -> list[int]:
        _require_unicode(text)
        self._backend.encode_special_tokens = special_as_text
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if self._adds_bos and self.bos_id is not None else ids

    def _named_token(self, token: Any) -> int | None:
        content = _token_text(token)
        return None if content is None else self._backend.token_to_id(content)


def _token_text(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _require_unicode(text: str) -> None:
    if not isinstance(text, str):
        raise UsageError(f"expected a text, found {text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt is not valid UTF-8 at character {error.start}: fix its encoding") from error


def _without_added_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    # The parts are shared, not copied: encode_special_tokens alone would leave <think> and its like tokens.
    literal = tokenizers.Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(backend, part) is not None:
            setattr(literal, part, getattr(backend, part))
    return literal


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not files.is_file(path):
        raise CheckpointError(
            f"{path.parent} has no {TOKENIZER_FILE}, which text needs: give token ids with --prompt-ids, "
            f"or copy the model's {TOKENIZER_FILE} there"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: not a tokenizer that the tokenizers library reads: {error}") from error
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    if decoder.get("type") == "Sequence" and len(decoder["decoders"]) == 1:
        decoder = decoder["decoders"][0]
    if decoder.get("type") != "ByteLevel":
        raise CheckpointError(
            f"{path}: expected a byte-level BPE tokenizer (decoder ByteLevel, as Qwen's), "
            f"found decoder {decoder.get('type')}: give token ids with --prompt-ids"
        )
    backend.no_truncation()
    backend.no_padding()
    return backend
