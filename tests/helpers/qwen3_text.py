"""Qwen3's real tokenizer and chat templates, from tests/golden/chat."""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from dist_moe.text.chat import ChatFormat
from dist_moe.text.chat_template import ChatTemplate
from dist_moe.text.tokenizer import Tokenizer

CHAT = Path(__file__).resolve().parents[1] / "golden" / "chat"


@cache
def qwen3_tokenizer() -> Tokenizer:
    """Read once for all tests: it takes a second."""
    with TemporaryDirectory() as directory:
        packed = (CHAT / "tokenizer.json.xz").read_bytes()
        (Path(directory) / "tokenizer.json").write_bytes(lzma.decompress(packed))
        return Tokenizer(Path(directory))


@cache
def qwen3_template(name: str) -> ChatTemplate:
    """One of hybrid, always, instruct and coder."""
    return ChatTemplate((CHAT / f"{name}.jinja").read_text(encoding="utf-8"), f"{name}.jinja")


@cache
def qwen3_format(name: str) -> ChatFormat:
    """The same as a conversation's format."""
    return ChatFormat(qwen3_tokenizer(), {"default": qwen3_template(name)})
