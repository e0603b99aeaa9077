"""Bad input of every format: one sentence of exit code 2, and nothing half-written that looks whole."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.checkpoint.source import open_source
from dist_moe.errors import DistMoeError, PlaceError, StoreError
from dist_moe.store import writer
from dist_moe.store.reader import Store
from helpers.tiny_gguf import SCALE_BYTES, WIDE, random_blocks, write_gguf
from helpers.tiny_model import TinyModel
from helpers.tiny_qw3w import MODEL, file_bytes, quantized, record
from helpers.tiny_store import contents, run_convert


def truncated(directory: Path) -> Path:
    weights = MODEL.write(directory) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return directory


def index_of_a_missing_file(directory: Path) -> Path:
    weights = MODEL.write(directory) / "model.safetensors"
    weights.unlink()
    places = dict.fromkeys(MODEL.tensors(), "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


def another_shape(directory: Path) -> Path:
    MODEL.write(directory)
    (directory / "config.json").write_text(json.dumps(MODEL.config_json() | {"moe_intermediate_size": 96}))
    return directory


def an_unknown_type(directory: Path) -> Path:
    write_gguf(directory / "m.gguf", WIDE, "TQ2_0")
    return directory / "m.gguf"


def k_quants_with_nan(directory: Path) -> Path:
    blocks = random_blocks((256, 256), "Q4_K")
    blocks[3, SCALE_BYTES["Q4_K"][0] : 2] = np.array([np.nan], np.float16).view(np.uint8)
    write_gguf(directory / "m.gguf", WIDE, "Q4_K", data={"blk.0.attn_q.weight": blocks})
    return directory / "m.gguf"


def qw3w_with_infinite_scales(directory: Path) -> Path:
    records = []
    for name, values in MODEL.tensors().items():
        parts = [(name, 0, values)]
        if name == "model.layers.1.mlp.experts.2.down_proj.weight":
            parts, _ = quantized(name, values, "q8", 32)
            parts[0][2][:2] = np.inf
        records += [record(part, dtype, array, None) for part, dtype, array in parts]
    (directory / "m.bin").write_bytes(file_bytes(records, 1))
    (directory / "config.json").write_text(json.dumps(MODEL.config_json()))
    return directory / "m.bin"


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (truncated, "model.safetensors: truncated: expected at least"),
    "index": (index_of_a_missing_file, "names 1 weight files, but 1 of them is not in the directory"),
    "shape": (another_shape, "has shape [192, 64], but config.json makes it [96, 64]"),
    "type": (an_unknown_type, "tensors have a type that dist-moe does not read ("),
    "nan": (k_quants_with_nan, "weights that are NaN, infinite or too large for their format (layers.0.q: 256)"),
    "infinite": (qw3w_with_infinite_scales, "too large for their format (layers.1.experts.2.down: 64)"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_and_leaves_no_store(tmp_path: Path, case: str) -> None:
    make, expected = CASES[case]
    (tmp_path / "in").mkdir()
    path, store = make(tmp_path / "in"), tmp_path / "store"
    with pytest.raises(DistMoeError) as caught:
        run_convert(open_source(path), store)  # type: ignore[arg-type]
    assert expected in str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (store / "manifest.json").exists()
    with pytest.raises(StoreError):
        Store.open(store)


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_a_disk_that_gets_full_leaves_a_store_that_a_rerun_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    source = Checkpoint.open(TinyModel().write(tmp_path / "model"))
    run_convert(source, tmp_path / "whole", nodes=2)
    left, real = iter(range(calls)), writer.FileWriter._flush

    def full(self: writer.FileWriter, count: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, count)

    with monkeypatch.context() as patch:
        patch.setattr(writer.FileWriter, "_flush", full)
        with pytest.raises(PlaceError, match=r"\(No space left on device\).*the same command continues"):
            run_convert(source, tmp_path / "store", nodes=2)
    assert not list((tmp_path / "store").glob(".*partial*"))
    with pytest.raises(StoreError, match=r"incomplete|not a store"):
        Store.open(tmp_path / "store")
    run_convert(source, tmp_path / "store", nodes=2)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
