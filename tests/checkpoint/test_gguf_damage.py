"""Damaged GGUF files: one sentence each, quickly, and no large allocation."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dist_moe.checkpoint.source import open_gguf
from dist_moe.errors import CheckpointError
from helpers.tiny_gguf import write_gguf
from helpers.tiny_model import TinyModel

SMALL = TinyModel(layers=1, dense_layers=(), experts=2, experts_per_token=1, vocabulary=40)
TEXTS = {"general.name": "tiny", "general.tags": ["one", "two", "three"], "general.numbers": [1, 2, 3]}
MUTATIONS = 400
LARGEST = 2**64 - 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    write_gguf(path, SMALL, changes=TEXTS)
    return path.read_bytes()


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        open_gguf(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def test_a_truncated_file_says_how_long_it_is(whole: bytes, tmp_path: Path) -> None:
    assert "something ends at byte " in refusal(tmp_path / "m", whole[:-1])
    assert f"the file has {len(whole) - 1} bytes (truncated?)" in refusal(tmp_path / "m", whole[:-1])
    assert "it has 23 bytes, too few for a header" in refusal(tmp_path / "m", whole[:23])
    assert "it has 0 bytes" in refusal(tmp_path / "m", b"")


def test_every_truncated_header_is_refused(whole: bytes, tmp_path: Path) -> None:
    for length in range(24, 3000, 37):
        assert "damaged" in refusal(tmp_path / "m", whole[:length])


@pytest.mark.parametrize(
    ("offset", "value", "expected"),
    [
        (0, b"GGML", "it begins with b'GGML', not with GGUF"),
        (4, struct.pack("<I", 1), "it has version 1, expected 2 or 3"),
        (4, struct.pack(">I", 3), "its numbers are big-endian"),
        (8, struct.pack("<Q", LARGEST), f"it claims {LARGEST} tensors"),
        (16, struct.pack("<Q", LARGEST), f"and {LARGEST} metadata entries"),
        (24, struct.pack("<Q", LARGEST), "something ends at byte"),
    ],
)
def test_absurd_starts(whole: bytes, tmp_path: Path, offset: int, value: bytes, expected: str) -> None:
    assert expected in refusal(tmp_path / "m", whole[:offset] + value + whole[offset + len(value) :])


@pytest.mark.parametrize(
    ("key", "count", "expected"),
    [
        ("general.tags", 2**40, "its metadata has an array of 1099511627776 times STRING"),
        ("general.numbers", 2**40, "its metadata has an array of 1099511627776 times INT32"),
        ("general.numbers", 2**20, "something ends at byte"),
        ("general.tags", 99, "a string ends at byte"),
    ],
)
def test_absurd_arrays(whole: bytes, tmp_path: Path, key: str, count: int, expected: str) -> None:
    at = whole.index(key.encode()) + len(key) + 4 + 4
    assert expected in refusal(tmp_path / "m", whole[:at] + struct.pack("<Q", count) + whole[at + 8 :])


def test_a_name_of_two_lines_stays_in_one_sentence(whole: bytes, tmp_path: Path) -> None:
    data = whole.replace(b"output_norm.weight", b"output_norm\nweight")
    assert r"damaged: a tensor is called 'output_norm\nweight'" in refusal(tmp_path / "m", data)


def test_a_header_of_noise_never_crashes(whole: bytes, tmp_path: Path) -> None:
    header_bytes = whole.index(b"output_norm.weight") + 100
    random = np.random.default_rng(5)
    outcomes = {"refused": 0, "read": 0}
    tracemalloc.start()
    for _ in range(MUTATIONS):
        data = bytearray(whole)
        for at in random.integers(0, header_bytes, random.integers(1, 4)):
            width = int(random.choice([1, 1, 4, 8]))
            data[at : at + width] = random.choice([random.bytes(width), b"\xff" * width, bytes(width)])
        path = tmp_path / "m"
        path.write_bytes(bytes(data[: len(whole)]))
        try:
            checkpoint = open_gguf(path)
            checkpoint.text_files()
            checkpoint.fingerprint()
            outcomes["read"] += 1
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
            outcomes["refused"] += 1
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 64 << 20
    assert outcomes["refused"] > MUTATIONS // 2, outcomes
