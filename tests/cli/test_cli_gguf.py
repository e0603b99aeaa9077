"""`dist-moe shard` and `dist-moe run` take a GGUF file as they take a Hugging Face directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_moe.demo import demo_model_directory
from helpers.tiny_gguf import tokenizer_keys, write_gguf
from helpers.tiny_model import TinyModel

MODEL = TinyModel(layers=1, dense_layers=(), experts=4, experts_per_token=2, vocabulary=1030)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, MODEL, types={"output.weight": "Q8_0"}, tokenizer=tokenizer_keys(demo_model_directory(), 1030))
    return path


def dist_moe(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dist_moe", *words]
    environment = os.environ | {"DIST_MOE_CACHE": str(directory / "cache")}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=directory, env=environment)


def test_shard_keeps_the_files_format_and_says_what_it_rounds(model: Path, tmp_path: Path) -> None:
    done = dist_moe(tmp_path, "shard", str(model), "--nodes", "2")
    assert done.returncode == 0, done.stderr
    assert "16 matrices of type Q4_0 (layers.0.q, layers.0.k, layers.0.v ...): integers and scales kept" in done.stderr
    assert "1 matrices of type Q8_0 (lm_head): rounded to q4; --quant q8" in done.stderr
    assert done.stdout.splitlines()[-1] == "mpirun -n 2 dist-moe run -m tiny-q4-2"
    names = {path.name for path in (tmp_path / "tiny-q4-2").iterdir()}
    assert {"manifest.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names


def test_run_takes_the_file_itself_and_gives_the_stores_text(model: Path, tmp_path: Path) -> None:
    words = ["-p", "Once upon a time", "-n", "8", "--quiet", "--temperature", "0"]
    assert dist_moe(tmp_path, "shard", str(model), "-o", "store", "--quiet").returncode == 0
    texts = []
    for place in ("store", str(model), str(model)):
        done = dist_moe(tmp_path, "run", "-m", place, *words)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0]
    assert texts[0] == texts[1] == texts[2]
    cached = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "cache").iterdir())
    assert cached == ["tiny-q4", "tiny-text"]


@pytest.mark.parametrize("words", [["shard"], ["run", "-p", "x", "-m"]])
def test_a_bad_file_is_one_sentence(model: Path, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "short.gguf").write_bytes(model.read_bytes()[:5000])
    (tmp_path / "other.gguf").write_bytes(b"no model")
    for name, expected in (("short.gguf", "(truncated?)"), ("other.gguf", "is a file that does not begin with GGUF")):
        done = dist_moe(tmp_path, *words, name)
        assert done.returncode == 2
        assert expected in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_inspect_lists_the_tensors_and_their_types(model: Path, tmp_path: Path) -> None:
    done = dist_moe(tmp_path, "inspect", str(model), "--json")
    report = json.loads(done.stdout)
    types = {tensor["name"]: (tensor["format"], tensor["shape"]) for tensor in report["files"][0]["tensors"]}
    assert report["kind"] == "GGUF"
    assert types["output.weight"] == ("Q8_0", [1030, 64])
    assert types["blk.0.ffn_down_exps.weight"] == ("Q4_0", [4, 64, 192])
    refused = dist_moe(tmp_path, "inspect", str(model), "--verify")
    assert refused.returncode == 2
    assert "has no checksums, as only the files of a store have them" in refused.stderr


def test_a_directory_around_the_file_leads_to_it(model: Path, tmp_path: Path) -> None:
    done = dist_moe(tmp_path, "shard", str(model.parent))
    assert done.returncode == 2
    assert f"has no config.json, but tiny.gguf; give that file: {model}" in done.stderr
