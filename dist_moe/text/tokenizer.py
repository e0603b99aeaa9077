"""A model's own byte-level BPE tokenizer, read from the files beside its weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from dist_moe import files
from dist_moe.errors import CheckpointError, UsageError
from dist_moe.text.json_file import read_json_object
from dist_moe.text.stream import TextStream, byte_level_alphabet

TOKENIZER_FILE = "tokenizer.json"


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
        self._byte_of_character = byte_level_alphabet()
        self.size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = self._named_token(settings.get("bos_token"))
        self.eos_id = self._named_token(settings.get("eos_token"))
        self._adds_bos = bool(settings.get("add_bos_token")) and self.bos_id is not None

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

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens, special ones left out and broken characters as U+FFFD."""
        stream = self.stream()
        return "".join([*map(stream.push, ids), stream.finish()])

    def stream(self) -> TextStream:
        """A decoder that takes one token at a time."""
        return TextStream(self.token_bytes)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for special tokens and for ids beyond the tokenizer."""
        content = None if token in self._special_ids else self._backend.id_to_token(token)
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
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the prompt is not valid UTF-8 at character {error.start}: fix its encoding") from error
        self._backend.encode_special_tokens = special_as_text
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if self._adds_bos and self.bos_id is not None else ids

    def _named_token(self, token: Any) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        return self._backend.token_to_id(content) if isinstance(content, str) else None


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
