"""Directories with a QW3W file for each tensor: exact values, few open files, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_moe.checkpoint.names import locations
from dist_moe.checkpoint.qw3w_checkpoint import Qw3wCheckpoint
from dist_moe.checkpoint.source import file_format, open_source
from dist_moe.errors import CheckpointError
from dist_moe.store.inspection import inspect_path
from dist_moe.store.models import find_model, is_source
from helpers.tiny_qw3w import MODEL, write_qw3w_directory

UP = "model.layers.0.mlp.experts.0.up_proj.weight"


@pytest.mark.parametrize(("version", "kind", "group"), [(1, "", 0), (1, "q8", 0), (1, "q4", 0), (2, "q4z", 48)])
def test_every_value_is_read_exactly(tmp_path: Path, version: int, kind: str, group: int) -> None:
    values = write_qw3w_directory(tmp_path / "tensors", kind=kind, group=group, version=version)
    assert file_format(tmp_path / "tensors") == "QW3W"
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    checkpoint = open_source(tmp_path / "tensors")
    assert isinstance(checkpoint, Qw3wCheckpoint)
    for name in checkpoint.names():
        expected = values[locations(checkpoint.config, values)[name].tensor]
        assert np.array_equal(checkpoint.read(name), expected), name
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files


def test_it_is_a_model_and_no_store(tmp_path: Path) -> None:
    directory = tmp_path / "tensors"
    write_qw3w_directory(directory, kind="q8")
    assert is_source(directory)
    source = find_model(str(directory), None)
    assert source.format is not None
    assert str(source.read_config()) == str(open_source(directory).config)
    assert source.name() == "tensors"
    (report,) = inspect_path(directory).files
    assert {tensor.name for tensor in report.tensors} >= {f"{UP}.q8", f"{UP}.scale", "model.norm.weight"}
    assert report.file_bytes == sum(path.stat().st_size for path in directory.glob("*.bin"))


def test_another_model_has_another_fingerprint(tmp_path: Path) -> None:
    for name, kind in (("one", "q8"), ("two", "q8"), ("three", "q4")):
        write_qw3w_directory(tmp_path / name, kind=kind)
    one, two, three = (open_source(tmp_path / name).fingerprint() for name in ("one", "two", "three"))
    assert one == two != three
    changed = tmp_path / "two" / "model.norm.weight.bin"
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    assert open_source(tmp_path / "two").fingerprint() != one


def remove_file(directory: Path) -> None:
    (directory / f"{UP}.bin").unlink()


def swap_files(directory: Path) -> None:
    (directory / f"{UP}.bin").write_bytes((directory / "model.norm.weight.bin").read_bytes())


def truncate_file(directory: Path) -> None:
    path = directory / f"{UP}.bin"
    path.write_bytes(path.read_bytes()[:-1])


def change_manifest(directory: Path, change: Callable[[list[dict[str, object]]], None]) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest["tensors"])
    path.write_text(json.dumps(manifest))


def leave_out(directory: Path) -> None:
    change_manifest(directory, lambda tensors: tensors.remove(next(part for part in tensors if part["name"] == UP)))


def name_twice(directory: Path) -> None:
    change_manifest(directory, lambda tensors: tensors.append(tensors[0]))


def lead_outside(directory: Path) -> None:
    change_manifest(directory, lambda tensors: tensors[0].update(file="../config.json"))


def name_none(directory: Path) -> None:
    change_manifest(directory, list.clear)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove_file, f"{UP}.bin: is missing, but manifest.json beside it says that it holds {UP}: copy"),
        (swap_files, f"{UP}.bin: holds model.norm.weight, but manifest.json beside it says {UP}; export"),
        (truncate_file, f"{UP} ends at byte .* \\(truncated"),
        (leave_out, f"tensor {UP} is missing"),
        (name_twice, "which manifest.json names twice; export"),
        (lead_outside, "config.json: is missing, but manifest.json"),
        (name_none, "manifest.json: names no tensor"),
    ],
)
def test_damage_is_one_sentence(tmp_path: Path, damage: Callable[[Path], None], sentence: str) -> None:
    write_qw3w_directory(tmp_path / "tensors", MODEL)
    damage(tmp_path / "tensors")
    with pytest.raises(CheckpointError, match=sentence) as caught:
        open_source(tmp_path / "tensors")
    assert "\n" not in str(caught.value)
