"""A store's text files from a GGUF's metadata: tokenizer, chat templates, and what ends a text.

The metadata keep tokens, their kinds and the merges; what they leave out (normalization, the split into words) is
known by the name in `tokenizer.ggml.pre` alone, so only Qwen's is accepted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar

from dist_moe.errors import CheckpointError

Item = TypeVar("Item")

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Files name one end token, Qwen has two: llama.cpp ends a text at these names, too (llama-vocab.cpp).
ENDS = ("<|im_end|>", "<|endoftext|>")
SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
ADVICE = "get the file from another place, or give the Hugging Face directory"


def text_files(where: str, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The files by name, as a Hugging Face directory would have them; none if the file has no tokenizer.

    Args:
        where: The file, for errors.
        metadata: Its keys and values.

    Raises:
        CheckpointError: The tokenizer is of another kind than Qwen's, or damaged.
    """
    if metadata.get(PREFIX + "model", "none") in ("none", "no_vocab"):
        return {}
    tokens, kinds = read_tokens(where, metadata)
    made: dict[str, dict[str, Any]] = {
        "tokenizer.json": tokenizer_json(tokens, kinds, read_merges(where, metadata, tokens)),
        "tokenizer_config.json": tokenizer_config(where, metadata, tokens),
        "generation_config.json": generation_config(where, metadata, tokens, kinds),
    }
    found = {name: (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode() for name, value in made.items()}
    # Beside a file, templates in tokenizer_config.json do not count.
    if isinstance(template := metadata.get(TEMPLATE), str) and "chat_template" not in made["tokenizer_config.json"]:
        found["chat_template.jinja"] = template.encode()
    return found


def read_tokens(where: str, metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """The tokens by id, and their kinds."""
    for key, expected in (("model", "gpt2"), ("pre", "qwen2")):
        if metadata.get(PREFIX + key) != expected:
            raise CheckpointError(
                f'{where}: {PREFIX}{key} is {metadata.get(PREFIX + key)!r}, expected "{expected}", as Qwen3 has it;'
                f" {ADVICE}"
            )
    tokens, kinds = metadata.get(PREFIX + "tokens"), metadata.get(PREFIX + "token_type")
    if not is_list(tokens, str) or not is_list(kinds, int) or len(tokens) != len(kinds):
        raise CheckpointError(
            f"{where}: {PREFIX}tokens and {PREFIX}token_type are not two lists of one length; {ADVICE}"
        )
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{where}: {PREFIX}tokens holds a token twice; {ADVICE}")
    strange = sorted(set(kinds) - {NORMAL, CONTROL, USER_DEFINED, UNUSED})
    if strange:
        raise CheckpointError(f"{where}: {PREFIX}token_type has {strange[0]}, which byte-level BPE lacks; {ADVICE}")
    return tokens, kinds


def read_merges(where: str, metadata: Mapping[str, Any], tokens: list[str]) -> list[list[str]]:
    """The merges as pairs, each of tokens that make a token."""
    merges, known = metadata.get(PREFIX + "merges"), set(tokens)
    if not is_list(merges, str):
        raise CheckpointError(f"{where}: {PREFIX}merges is no list of texts; {ADVICE}")
    pairs = [merge.split(" ") for merge in merges]
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2 or not {*pair, "".join(pair)} <= known:
            raise CheckpointError(f"{where}: {PREFIX}merges has {merge!r}, which does not join two tokens; {ADVICE}")
    return pairs


def tokenizer_json(tokens: list[str], kinds: list[int], merges: list[list[str]]) -> dict[str, Any]:
    """Qwen's tokenizer.json; added tokens stand in the vocabulary, too, which alone gives them their ids."""
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": token, "content": tokens[token], **options, "special": kind == CONTROL}
        for token, kind in enumerate(kinds)
        if kind in (CONTROL, USER_DEFINED)
    ]
    words = {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {text: token for token, text in enumerate(tokens) if kinds[token] != UNUSED},
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, level]},
        "post_processor": level,
        "decoder": level,
        "model": model,
    }


def tokenizer_config(where: str, metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """The named tokens, and the named chat templates if there are more than the usual one."""
    found: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer"}
    for key in ("bos", "eos", "padding"):
        token = token_id(where, metadata, f"{key}_token_id", tokens)
        found["pad_token" if key == "padding" else f"{key}_token"] = None if token is None else tokens[token]
    found["add_bos_token"] = metadata.get(PREFIX + "add_bos_token") is True
    names = metadata.get("tokenizer.chat_templates")
    if is_list(names, str):
        templates = {name: metadata.get(f"{TEMPLATE}.{name}") for name in names}
        templates |= {"default": metadata.get(TEMPLATE)}
        found["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items() if isinstance(text, str)
        ]
    return found


def generation_config(where: str, metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """What ends a text, and the sampling that the makers advise, if the file says so."""
    ids = {token_id(where, metadata, f"{key}_token_id", tokens) for key in ("eos", "eot", "eom")} - {None}
    ids |= {token for token, text in enumerate(tokens) if kinds[token] == CONTROL and text in ENDS}
    found: dict[str, Any] = {"eos_token_id": sorted(token for token in ids if token is not None)}
    advised = {ours: metadata.get(f"general.sampling.{theirs}") for ours, theirs in SAMPLING.items()}
    known = {name: value for name, value in advised.items() if isinstance(value, (int, float))}
    # 7 digits bring back the decimal number that was rounded to a 32-bit float.
    rounded = {name: float(f"{value:.7g}") if isinstance(value, float) else value for name, value in known.items()}
    return found | ({"do_sample": True, **rounded} if rounded else {})


def token_id(where: str, metadata: Mapping[str, Any], key: str, tokens: list[str]) -> int | None:
    """A token that the metadata name by its id."""
    token = metadata.get(PREFIX + key)
    if token is None:
        return None
    if type(token) is not int or not 0 <= token < len(tokens):
        raise CheckpointError(f"{where}: {PREFIX}{key} is {token!r}, expected 0 to {len(tokens) - 1}; {ADVICE}")
    return token


def is_list(value: object, kind: type[Item]) -> TypeGuard[list[Item]]:
    """Whether a value is a list of one kind of things."""
    return isinstance(value, list) and all(type(item) is kind for item in value)
