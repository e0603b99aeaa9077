"""`dist-moe shard`, `run` and `inspect` take a QW3W file as they take a Hugging Face directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dist_moe.demo import demo_model_directory
from helpers.tiny_model import TinyModel
from helpers.tiny_qw3w import write_qw3w, write_qw3w_directory

MODEL = TinyModel(layers=1, dense_layers=(), experts=4, experts_per_token=2, vocabulary=1030)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qw3w")
    write_qw3w(directory / "all.bin", MODEL, "q4", 32)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(demo_model_directory() / name, directory)
    return directory / "all.bin"


def dist_moe(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dist_moe", *words]
    environment = os.environ | {"DIST_MOE_CACHE": str(directory / "cache")}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=directory, env=environment)


def test_shard_and_run_give_one_text(model: Path, tmp_path: Path) -> None:
    done = dist_moe(tmp_path, "shard", str(model), "--nodes", "2", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "12 matrices of type QW3W_Q4 (layers.0.experts.0.gate, " in done.stderr
    assert "decoded exactly, then rounded to q4; --quant f32 keeps every value, --quant q8 loses less" in done.stderr
    assert done.stdout.splitlines()[-1] == "mpirun -n 2 dist-moe run -m all-q4-2"
    words = ["-p", "Once upon a time", "-n", "8", "--quiet", "--temperature", "0"]
    texts = []
    for place in ("all-q4-2", str(model)):
        done = dist_moe(tmp_path, "run", "-m", place, *words)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0]
    assert texts[0] == texts[1]


def test_a_store_of_f32_equals_that_of_the_checkpoint(tmp_path: Path) -> None:
    small = replace(MODEL, vocabulary=300)
    small.write(tmp_path / "hf")
    write_qw3w(tmp_path / "all.bin", small, version=1)
    write_qw3w_directory(tmp_path / "tensors", small)
    for source, store in (("hf", "a"), ("all.bin", "b"), ("tensors", "c")):
        done = dist_moe(tmp_path, "shard", source, "--quant", "q8", "-o", store, "--quiet")
        assert done.returncode == 0, done.stderr
    found = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(found) > 1
    for path in found:
        assert weights(tmp_path / "b" / path.name) == weights(tmp_path / "c" / path.name) == weights(path)


def weights(path: Path) -> bytes:
    """A safetensors file without its header, which names the source."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_inspect_lists_the_records(model: Path, tmp_path: Path) -> None:
    report = json.loads(dist_moe(tmp_path, "inspect", str(model), "--json").stdout)
    types = {tensor["name"]: (tensor["format"], tensor["shape"]) for tensor in report["files"][0]["tensors"]}
    assert report["kind"] == "QW3W"
    assert types["model.layers.0.mlp.experts.0.up_proj.weight.q4"] == ("i4 pairs", [192, 32])
    assert types["model.norm.weight"] == ("f32", [64])


@pytest.mark.parametrize("words", [["shard"], ["run", "-p", "x", "-m"], ["inspect"]])
def test_a_damaged_file_is_one_sentence(model: Path, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "short.bin").write_bytes(model.read_bytes()[:5000])
    done = dist_moe(tmp_path, *words, "short.bin")
    assert done.returncode == 2
    assert "short.bin: expected a QW3W file, but it is damaged: model.embed_tokens.weight ends at byte" in done.stderr
    assert len(done.stderr.splitlines()) == 1
