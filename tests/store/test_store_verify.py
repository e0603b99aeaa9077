"""Verification: a flipped bit anywhere in any file is found, and named as closely as can be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dist_moe.checkpoint.safetensors_file import SafetensorsFile
from dist_moe.cli.inspect import inspect
from dist_moe.errors import CheckpointError, StoreError
from helpers.tiny_store import contents

MakeStore = Callable[..., Path]
SHARD = "shard-00002-of-00002.safetensors"


def run_inspect(*arguments: object) -> Result:
    return CliRunner().invoke(inspect, [str(argument) for argument in arguments])


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x04
    path.write_bytes(data)


def place_of(path: Path, tensor: str) -> tuple[int, int]:
    entry = SafetensorsFile(path).entry(tensor)
    return entry.first_byte, entry.nbytes


def test_an_intact_store_verifies(make_store: MakeStore) -> None:
    result = run_inspect(make_store(nodes=2), "--verify")
    assert result.exit_code == 0
    assert "verified: every checksum agrees" in result.output


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (SHARD, "layers.0.heads", "layer 0, query head 5"),
        (SHARD, "layers.1.kv_heads", "layer 1, KV head 2"),
        (SHARD, "layers.1.chunks", "layer 1, expert 0, chunk 4"),
        (SHARD, "layers.2.chunks", "layer 2, expert 4, chunk 1"),
        (SHARD, "vocabulary", "vocabulary block 2"),
        (SHARD, "vocabulary.xxh3", "vocabulary block 2"),
        ("common.safetensors", "embedding", "tensor 'embedding'"),
        ("common.safetensors", "final_norm", "tensor 'final_norm'"),
        ("common.safetensors", "layers.2.router", "tensor 'layers.2.router'"),
        ("common.safetensors", "layers.1.q_bias.xxh3", "tensor 'layers.1.q_bias'"),
    ],
)
def test_a_flipped_bit_names_file_tensor_and_unit(make_store: MakeStore, name: str, tensor: str, words: str) -> None:
    directory = make_store(nodes=2)
    first, count = place_of(directory / name, tensor)
    flip(directory / name, first + count - 1)
    result = run_inspect(directory, "--verify")
    assert isinstance(result.exception, StoreError)
    assert result.exception.exit_code == 2
    (line,) = str(result.exception).splitlines()
    assert line.startswith(f"{directory / name}: tensor ")
    assert words in line
    other = SHARD if name != SHARD else "common.safetensors"
    assert run_inspect(directory / other, "--verify").exit_code == 0
    assert words in str(run_inspect(directory / name, "--verify").exception)


def test_every_damaged_unit_is_named(make_store: MakeStore) -> None:
    directory = make_store(nodes=2)
    for tensor in ("layers.0.heads", "layers.2.heads"):
        first, count = place_of(directory / SHARD, tensor)
        flip(directory / SHARD, first)
        flip(directory / SHARD, first + count - 1)
    lines = str(run_inspect(directory, "--verify").exception).splitlines()
    assert len(lines) == 4
    assert ["query head 3" in line for line in lines] == [True, False, True, False]


def test_a_flipped_bit_in_padding_is_found(make_store: MakeStore) -> None:
    directory = make_store(nodes=2)
    first, count = place_of(directory / "common.safetensors", "final_norm")
    assert count % 64
    flip(directory / "common.safetensors", first + count)
    result = run_inspect(directory, "--verify")
    assert "common.safetensors: has checksum" in str(result.exception)


def test_a_flipped_bit_in_a_copied_file_is_found(make_store: MakeStore) -> None:
    directory = make_store()
    flip(directory / "config.json", 30)
    assert "config.json: has checksum" in str(run_inspect(directory, "--verify").exception)


@pytest.mark.parametrize("position", [1, 40])
def test_a_flipped_bit_in_a_header_is_found_even_without_verify(make_store: MakeStore, position: int) -> None:
    directory = make_store(nodes=2)
    flip(directory / SHARD, position)
    for arguments in ((), ("--verify",)):
        assert "its header has checksum" in str(run_inspect(directory, *arguments).exception)


def test_a_lone_shard_is_verified_by_its_own_checksums(tmp_path: Path, make_store: MakeStore) -> None:
    shard = tmp_path / "copied.safetensors"
    shutil.copy(make_store(nodes=2) / SHARD, shard)
    assert run_inspect(shard, "--verify").exit_code == 0
    first, count = place_of(shard, "layers.0.heads")
    flip(shard, first + count - 1)
    assert "tensor 'layers.0.heads', unit 5 is damaged" in str(run_inspect(shard, "--verify").exception)


def test_the_list_names_tensors_formats_owners_and_totals(make_store: MakeStore) -> None:
    directory = make_store(nodes=2)
    text = run_inspect(directory).output
    for words in (
        f"{directory}: store",
        "Qwen3MoeForCausalLM",
        "common.safetensors  ",
        "every node",
        "node 2",
        "q4, groups of 32",
        "units 3-5",
        "totals",
    ):
        assert words in text


def test_json_lists_the_same(make_store: MakeStore) -> None:
    directory = make_store(nodes=2)
    report = json.loads(run_inspect(directory, "--json", "--verify").stdout)
    assert report["kind"] == "store"
    assert report["damages"] == []
    assert (report["store"]["weights"], report["store"]["nodes"]) == ("q4", 2)
    shard = next(file for file in report["files"] if file["name"] == SHARD)
    heads = next(tensor for tensor in shard["tensors"] if tensor["name"] == "layers.0.heads")
    assert (shard["owner"], heads["units"], heads["format"]) == ("node 2", [[3, 6]], "q4, groups of 32")
    assert report["totals"]["heads"]["units"] == 3 * 6
    assert report["totals"]["chunks"]["units"] == 10 + 5 + 10
    sizes = {name: len(data) for name, data in contents(directory).items() if name != "manifest.json"}
    assert {file["name"]: file["file_bytes"] for file in report["files"]} == sizes


def test_a_shard_that_is_elsewhere_is_listed_as_such(make_store: MakeStore) -> None:
    directory = make_store(nodes=2)
    (directory / SHARD).unlink()
    result = run_inspect(directory, "--verify")
    assert result.exit_code == 0
    assert f"{SHARD}" in result.output
    assert "(not on this machine)" in result.output


def test_plain_safetensors_are_listed_but_have_nothing_to_verify(tmp_path: Path, checkpoint: object) -> None:
    for path in (tmp_path / "odd", tmp_path / "odd" / "model.safetensors"):
        result = run_inspect(path)
        assert result.exit_code == 0
        assert "model.layers.0.mlp.gate.weight" in result.output
        assert "F32" in result.output
        assert "has no checksums" in str(run_inspect(path, "--verify").exception)


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("hello, this is no tensor")
    assert isinstance(run_inspect(tmp_path / "file.txt").exception, CheckpointError)
    assert "is not a store" in str(run_inspect(tmp_path).exception)
    assert "does not exist" in str(run_inspect(tmp_path / "nowhere").exception)


def test_ranks_other_than_the_first_say_nothing(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    result = run_inspect(make_store())
    assert (result.exit_code, result.output) == (0, "")
