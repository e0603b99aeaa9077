"""GGUF models that were split into several files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dist_moe.checkpoint.gguf_names import model_name
from dist_moe.checkpoint.source import Source, open_source
from dist_moe.errors import CheckpointError
from helpers.tiny_gguf import write_gguf

FIRST = "m-00001-of-00004.gguf"
SECOND, THIRD = FIRST.replace("00001", "00002"), FIRST.replace("00001", "00003")


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The first of four files, 8 tensors in each but the last."""
    directory = tmp_path / "split"
    directory.mkdir()
    write_gguf(directory / "m.gguf", tensors_per_file=8)
    return directory / FIRST


@pytest.fixture
def whole(tmp_path: Path) -> Source:
    write_gguf(tmp_path / "m.gguf")
    return open_source(tmp_path / "m.gguf")


def test_they_are_the_same_model_as_one_file(first: Path, whole: Source) -> None:
    found = open_source(first)
    assert len(list(first.parent.iterdir())) == 4
    assert found.names() == whole.names()
    np.testing.assert_equal(vars(found.config), vars(whole.config))
    assert found.preferred_dtype() == whole.preferred_dtype() == "q4_0"
    for name in whole.names():
        assert np.array_equal(found.read(name), whole.read(name)), name


def test_every_file_counts_in_the_fingerprint(first: Path) -> None:
    before = {open_source(first).fingerprint()}
    for name in (FIRST, SECOND, THIRD):
        path = first.with_name(name)
        path.write_bytes(path.read_bytes() + bytes(32))
        before.add(open_source(first).fingerprint())
    assert len(before) == 4


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    return str(caught.value)


def test_a_missing_file_is_named(first: Path) -> None:
    missing = first.with_name(THIRD)
    missing.unlink()
    expected = f"{missing}: is missing: it is file 3 of the 4 that {FIRST} begins; put all of them into one directory"
    assert refusal(first) == expected


def test_the_first_file_is_asked_for(first: Path) -> None:
    second = first.with_name(SECOND)
    assert refusal(second) == f"{second}: is file 2 of the 4 of a model; give the first one, {FIRST}"


def test_another_file_under_the_name_is_refused(first: Path) -> None:
    second = first.with_name(SECOND)
    shutil.copy(first.with_name(THIRD), second)
    assert refusal(first).startswith(
        f"{second}: expected file 2 of 4 (split.no 1, split.count 4), but its metadata say"
    )
    assert "split.no 2, split.count 4" in refusal(first)


def test_a_file_of_another_model_with_the_same_tensors_is_refused(first: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_gguf(other / "m.gguf", tensors_per_file=7)
    shutil.copy(other / SECOND, first.with_name(SECOND))
    assert "as an earlier file of the model has" in refusal(first)


def test_a_damaged_file_is_named(first: Path) -> None:
    third = first.with_name(THIRD)
    third.write_bytes(third.read_bytes()[:100])
    assert refusal(first).startswith(f"{third}: expected a GGUF file, but it is damaged")


def test_a_file_that_was_renamed_is_told_its_name(first: Path) -> None:
    renamed = first.rename(first.with_name("model.gguf"))
    assert refusal(renamed).startswith(f"{renamed}: is one of 4 files of a split model; join them first: ")
    assert refusal(renamed).endswith("NAME-00001-of-00004.gguf)")


def test_a_store_is_named_after_the_model() -> None:
    assert model_name(Path("a/Qwen3-235B-Q4_0-00001-of-00003.gguf")) == "Qwen3-235B-Q4_0"
    assert model_name(Path("a/Qwen3-30B-1-of-3.gguf")) == "Qwen3-30B-1-of-3"
