"""The files of a directory: a sentence for every index, file or directory that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.errors import CheckpointError

MakeSource = Callable[..., Any]
AGAIN = "download the checkpoint again"


def refusal(directory: Path) -> str:
    """The sentence with which a directory is refused."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    return str(caught.value).replace(str(directory), "DIR")


def edit_index(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the index of a written checkpoint."""
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


NORM = "model.norm.weight"
FILE_1, FILE_2 = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
INDEX = "DIR/model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda index: index["weight_map"].update({NORM: FILE_1}),
            f"{INDEX}: places {NORM} in {FILE_1}, but that file does not hold it; {AGAIN}",
        ),
        (
            lambda index: index["weight_map"].update({"model.a": FILE_2}),
            f"{INDEX}: places model.a in {FILE_2}, but that file does not hold it; {AGAIN}",
        ),
        (
            lambda index: index["weight_map"].pop(NORM),
            f"{INDEX}: does not place {NORM} in {FILE_2}, but that file holds it; {AGAIN}",
        ),
        (
            lambda index: index["weight_map"].update({NORM: "other.safetensors"}),
            f"{INDEX}: names 3 weight files, but 1 of them is not in the directory, first other.safetensors; {AGAIN}",
        ),
        (
            lambda index: index["weight_map"].update({NORM: f"../{FILE_1}"}),
            f'{INDEX}: places {NORM} in "../{FILE_1}", expected a file name without a directory; {AGAIN}',
        ),
        (
            lambda index: index["weight_map"].update({NORM: 3}),
            f"{INDEX}: places {NORM} in 3, expected a file name without a directory; {AGAIN}",
        ),
        (
            lambda index: index.pop("weight_map"),
            f"{INDEX}: weight_map is null, expected tensor names with files; {AGAIN}",
        ),
        (
            lambda index: index.update({"weight_map": {}}),
            f"{INDEX}: weight_map is {{}}, expected tensor names with files; {AGAIN}",
        ),
    ],
)
def test_indexes_that_do_not_fit(
    change: Callable[[dict[str, Any]], None], sentence: str, make_source: MakeSource, tmp_path: Path
) -> None:
    make_source().write(tmp_path, shards=2)
    edit_index(tmp_path, change)
    assert refusal(tmp_path) == sentence


def test_a_missing_shard(make_source: MakeSource, tmp_path: Path) -> None:
    make_source().write(tmp_path, shards=2)
    for name in (FILE_1, FILE_2):
        (tmp_path / name).unlink()
    assert refusal(tmp_path) == (
        f"{INDEX}: names 2 weight files, but 2 of them are not in the directory, first {FILE_1}; {AGAIN}"
    )


def test_an_index_that_is_no_json(make_source: MakeSource, tmp_path: Path) -> None:
    make_source().write(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text("<html>")
    assert refusal(tmp_path) == (
        f"{INDEX}: expected JSON, but it does not parse (Expecting value: line 1 column 1 (char 0));"
        " copy the file again"
    )


def test_a_truncated_shard(make_source: MakeSource, tmp_path: Path) -> None:
    make_source().write(tmp_path, shards=2)
    content = (tmp_path / FILE_2).read_bytes()
    (tmp_path / FILE_2).write_bytes(content[:-1])
    assert refusal(tmp_path) == (
        f"DIR/{FILE_2}: truncated: expected at least {len(content)} bytes, actual {len(content) - 1};"
        " copy or download the file again"
    )


def test_directories_without_weights(make_source: MakeSource, tmp_path: Path) -> None:
    make_source().write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    expected = "DIR: expected model.safetensors or model.safetensors.index.json, found"
    assert refusal(tmp_path) == f"{expected} neither; {AGAIN}"
    name = "pytorch_model-00001-of-00002.bin"
    (tmp_path / name).write_bytes(b"")
    assert refusal(tmp_path) == (
        f"{expected} {name}, which dist-moe does not read; convert it to safetensors"
        " (transformers: model.save_pretrained(directory))"
    )
    (tmp_path / "model.gguf").write_bytes(b"")
    assert refusal(tmp_path) == f"{expected} model.gguf; give that file: DIR/model.gguf"


def test_no_directory(make_source: MakeSource, tmp_path: Path) -> None:
    give = "give the directory that holds config.json and model.safetensors"
    directory = tmp_path / "nothing"
    start = "DIR: expected a Hugging Face model directory, but it"
    assert refusal(directory) == f"{start} is not there; {give}"
    directory.write_text("")
    assert refusal(directory) == f"{start} is a file; {give}"
    directory.unlink()
    make_source().write(directory)
    (directory / "config.json").unlink()
    assert refusal(directory) == f"{start} has no config.json; {give}"
