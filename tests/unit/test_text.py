"""Tokenizer, incremental decoding and a model's generation settings, on a small tokenizer trained here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from dist_moe.errors import CheckpointError, UsageError
from dist_moe.text.generation_config import GenerationConfig, read_generation_config
from dist_moe.text.stream import TextStream, byte_level_alphabet
from dist_moe.text.tokenizer import Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make_tokenizer(directory: Path, **settings: object) -> Path:
    """Write a byte-level BPE tokenizer of 271 ids with Qwen's special tokens into the directory."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=266, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the cat and the dog sat on the mat", "größer, größer"] * 8, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.add_tokens(["<think>", "日本 語"])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), eos_token={"content": "<|im_end|>"}, bos_token=None)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


def test_size_counts_ids_to_the_largest_added_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.size == 271
    assert tokenizer.eos_id == 268
    assert tokenizer.bos_id is None


def test_a_plain_text_cannot_forge_a_special_token(tokenizer: Tokenizer) -> None:
    text = "the cat<|im_end|>"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.encode_trusted(text)[-1] == tokenizer.eos_id
    # The first answer must not depend on what was asked before.
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_leaves_special_tokens_out_and_keeps_other_added_ones(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode_trusted("<think>the cat<|im_end|>日本 語")) == "<think>the cat日本 語"


def test_ids_beyond_the_tokenizer_are_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.size, tokenizer.size + 1000]) == ""


@given(st.text(max_size=40))
def test_text_survives_encoding_and_decoding(tokenizer: Tokenizer, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        with pytest.raises(UsageError, match="not valid UTF-8 at character"):
            tokenizer.encode(text)
    else:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.integers(0, 275), max_size=60))
def test_streaming_gives_what_decoding_everything_at_once_gives(directory: Path, ids: list[int]) -> None:
    # Random ids are mostly broken UTF-8: both must put U+FFFD at the same places.
    expected = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).decode(ids, skip_special_tokens=True)
    stream = Tokenizer(directory).stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == expected


def test_a_character_waits_until_its_last_byte() -> None:
    stream = TextStream(lambda token: bytes([token]))
    assert [stream.push(byte) for byte in "é€😀".encode()] == ["", "é", "", "", "€", "", "", "", "😀"]
    assert stream.finish() == ""


def test_a_broken_character_is_replaced_as_soon_as_it_is_known() -> None:
    stream = TextStream(lambda token: bytes([token]))
    assert stream.push(0xF0) == ""
    assert stream.push(ord("a")) == "�a"
    assert stream.push(0xE2) == ""
    assert stream.finish() == "�"


def test_the_byte_level_alphabet_is_that_of_the_tokenizers_library() -> None:
    alphabet = byte_level_alphabet()
    assert sorted(alphabet) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    assert (alphabet["A"], alphabet["Ġ"], alphabet["Ċ"]) == (0x41, 0x20, 0x0A)


def test_bos_is_added_only_where_the_model_asks_for_it(tmp_path: Path) -> None:
    plain = Tokenizer(make_tokenizer(tmp_path, bos_token="<|endoftext|>"))
    assert plain.bos_id == 266
    assert plain.encode("") == []
    adding = Tokenizer(make_tokenizer(tmp_path, bos_token="<|endoftext|>", add_bos_token=True))
    assert adding.encode("") == [266]


def test_a_missing_tokenizer_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json.*--prompt-ids"):
        Tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer(tmp_path)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"expected a byte-level BPE tokenizer .* found decoder WordPiece"):
        Tokenizer(tmp_path)


def test_stop_ids_are_those_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert read_generation_config(tmp_path) == GenerationConfig(frozenset({3, 5, 7}))


def test_a_model_without_files_is_greedy_and_never_stops(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == GenerationConfig(frozenset())


def test_sampling_advice_counts_only_if_the_model_samples(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text('{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 1}')
    assert read_generation_config(tmp_path) == GenerationConfig(frozenset({1}), 0.6, 20, 0.95, 0.0)
    path.write_text('{"temperature": 0.6, "top_k": 20}')
    assert read_generation_config(tmp_path) == GenerationConfig(frozenset())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"eos_token_id": "</s>"}', "eos_token_id: expected a token id or a list of them, found '</s>'"),
        ('{"do_sample": true, "top_p": "high"}', "top_p: expected a number from 0 to 1, found 'high'"),
        ('{"do_sample": true, "temperature": NaN}', "temperature: expected a number from 0 to 100, found nan"),
        ("[1]", "expected a JSON object, found list"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_bad_generation_settings_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="generation_config") as caught:
        read_generation_config(tmp_path)
    assert message in str(caught.value)
