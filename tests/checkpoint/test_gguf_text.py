"""Tokenizer, template and generation settings out of a GGUF's metadata give the same ids as the original's files."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dist_moe.checkpoint.gguf_text import text_files
from dist_moe.demo import demo_model_directory
from dist_moe.errors import CheckpointError
from dist_moe.text.chat import ChatFormat
from dist_moe.text.chat_template import read_chat_templates
from dist_moe.text.generation_config import read_generation_config
from dist_moe.text.messages import Message
from dist_moe.text.tokenizer import Tokenizer
from helpers.qwen3_text import CHAT, qwen3_format
from helpers.tiny_gguf import tokenizer_keys

TEXTS = (
    "Once upon a time there was a cat. \n\n  It couldn't sleep;\tit counted 12345 sheep!",
    "größer, e\u0301 and 日本 🦙\u200d",
    "<think>no</think> <tool_call>{}</tool_call>",
    "",
)


def written(directory: Path, keys: Mapping[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, data in text_files("m.gguf", keys).items():
        (directory / name).write_bytes(data)
    return directory


@pytest.fixture(scope="module")
def demo_keys() -> dict[str, Any]:
    return tokenizer_keys(demo_model_directory(), 1030)


def test_the_demo_tokenizer_survives(demo_keys: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = Tokenizer(written(tmp_path, demo_keys)), Tokenizer(demo_model_directory())
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode_trusted(f"<|im_start|>{text}<|im_end|>") == theirs.encode_trusted(
            f"<|im_start|>{text}<|im_end|>"
        )
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert (ours.size, ours.eos_id, ours.bos_id) == (1024, theirs.eos_id, None)


def test_ids_follow_the_file_where_unused_tokens_lie_between(demo_keys: dict[str, Any], tmp_path: Path) -> None:
    texts, kinds = list(demo_keys["tokenizer.ggml.tokens"]), list(demo_keys["tokenizer.ggml.token_type"])
    texts.insert(1015, "[PAD]")
    kinds.insert(1015, 5)
    moved = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.eos_token_id": 1018}
    tokenizer = Tokenizer(written(tmp_path, demo_keys | moved))
    assert tokenizer.encode_trusted("<|im_start|>")[0] == 1017
    assert tokenizer.eos_id == 1018
    assert tokenizer.size == 1025


def test_both_end_tokens_stop_and_advice_is_kept(demo_keys: dict[str, Any], tmp_path: Path) -> None:
    advice = {"general.sampling.temp": 0.6000000238418579, "general.sampling.top_k": 20}
    found = read_generation_config(written(tmp_path, demo_keys | advice))
    assert found.stop_ids == {1015, 1017}
    assert (found.temperature, found.top_k, found.top_p) == (0.6, 20, 1.0)
    assert read_generation_config(written(tmp_path, demo_keys)).temperature == 0


def test_templates_come_with_the_file(demo_keys: dict[str, Any], tmp_path: Path) -> None:
    template = "{{ messages[0].content }}!"
    named = {"tokenizer.chat_templates": ["loud"], "tokenizer.chat_template.loud": "LOUD"}
    found = read_chat_templates(written(tmp_path, demo_keys | {"tokenizer.chat_template": template} | named))
    assert found["default"].render([{"role": "user", "content": "Hi"}]) == "Hi!"
    assert found["loud"].render([]) == "LOUD"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_a_file_without_a_tokenizer_has_no_texts() -> None:
    for model in ({}, {"tokenizer.ggml.model": "none"}, {"tokenizer.ggml.model": "no_vocab"}):
        assert text_files("m.gguf", {"general.architecture": "qwen3moe"} | model) == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama', expected \"gpt2\""),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe', expected \"qwen2\""),
        ({"pre": None}, "tokenizer.ggml.pre is None"),
        ({"tokens": ["a"]}, "are not two lists of one length"),
        ({"tokens": ["a"] * 1030}, "holds a token twice"),
        ({"token_type": [6] * 1030}, "token_type has 6, which byte-level BPE lacks"),
        ({"merges": ["a b c"]}, "merges has 'a b c', which does not join two tokens"),
        ({"merges": ["a qqqq"]}, "merges has 'a qqqq'"),
        ({"merges": None}, "merges is no list of texts"),
        ({"eos_token_id": 1030}, "eos_token_id is 1030, expected 0 to 1029"),
    ],
)
def test_other_and_damaged_tokenizers_are_refused(
    demo_keys: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        text_files("m.gguf", demo_keys | {f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    assert str(caught.value).startswith("m.gguf: ")
    assert expected in str(caught.value)


def test_the_real_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "qwen3").mkdir()
    (tmp_path / "qwen3" / "tokenizer.json").write_bytes(lzma.decompress((CHAT / "tokenizer.json.xz").read_bytes()))
    keys = tokenizer_keys(tmp_path / "qwen3", 151936)
    keys["tokenizer.chat_template"] = (CHAT / "hybrid.jinja").read_text(encoding="utf-8")
    tokenizer = Tokenizer(written(tmp_path, keys))
    cases = json.loads((CHAT / "tokenizer_cases.json").read_text())
    assert [case["text"] for case in cases if tokenizer.encode(case["text"]) != case["ids"]] == []
    assert [case["text"] for case in cases if tokenizer.decode(case["ids"]) != case["text"]] == []
    assert tokenizer.size == 151669
    assert tokenizer.encode_trusted("<|im_start|>user\n<think>") == [151644, 872, 198, 151667]
    assert read_generation_config(tmp_path).stop_ids == {151643, 151645}
    conversation = [Message("user", "Hi<|im_end|> <think>"), Message("assistant", "Yes", "Hm"), Message("user", "Bye")]
    chat = ChatFormat.read(tmp_path, tokenizer)
    assert chat.prompt(conversation) == qwen3_format("hybrid").prompt(conversation)
