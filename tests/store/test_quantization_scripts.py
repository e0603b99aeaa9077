"""benchmarks/quality.py and convert.py as far as they need neither llama.cpp nor time."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.kernels.formats import WeightFormat
from dist_moe.store.reader import Store
from helpers.tiny_gguf import MOE
from helpers.tiny_store import run_convert

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize(("fmt", "bits"), [("q4", 4.5), ("q8", 8.5), ("bf16", 16.0)])
def test_bits_are_counted_alike_for_both_engines(tmp_path: Path, load, fmt: str, bits: float) -> None:
    quality: ModuleType = load("quality")
    run_convert(Checkpoint.open(MOE.write(tmp_path / "hf")), tmp_path / "store", format=WeightFormat.parse(fmt))
    store = Store.open(tmp_path / "store")
    load("store_to_gguf").write_gguf(store, tmp_path / "m.gguf")
    assert quality.gguf_bits(tmp_path / "m.gguf", store.config) == bits
    # A store pads scales, rows and vocabulary blocks, here by far more than in a real model.
    assert bits <= quality.store_bits(store) <= 2 * bits


def test_a_table_is_sorted_by_bits(load) -> None:
    quality: ModuleType = load("quality")
    mean = quality.Mean(1.0, 0.25)
    rows = [quality.Row(engine, name, bits, 10, 2.0, mean, mean, mean) for engine, name, bits in
            (("dist-moe", "q4", 4.5), ("llama.cpp", "Q8_0", 8.5))]  # fmt: skip
    lines = quality.table(rows).splitlines()
    assert lines[2].startswith("| llama.cpp | Q8_0 | 8.50 | 10 | 2.0000 | 1.00000 ± 0.25000 | 1.000e+00 ± 2.5e-01 |")
    assert lines[3].startswith("| dist-moe | q4 | 4.50 |")


def test_a_checkpoint_of_a_shape_is_converted(tmp_path: Path, load) -> None:
    convert: ModuleType = load("convert")
    text = (ROOT / "configs" / "qwen3-30b-a3b.toml").read_text()
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "head_dim": 32}
    sizes |= {"vocab_size": 300, "num_experts": 8, "num_hidden_layers": 2}
    for name, value in sizes.items():
        text = re.sub(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
    convert.write_checkpoint(tmp_path / "source", convert.tomllib.loads(text)["architecture"])
    run = convert.convert_once(tmp_path / "source", tmp_path / "store", "q8", "--quant q8", 1)
    source_bytes = sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors"))
    assert (run.recipe, run.source_bytes, (tmp_path / "store").exists()) == ("q8", source_bytes, False)
    assert 1e6 < run.private_bytes < 2e9
    assert f"| q8 | 1 | {run.seconds:.1f} |" in convert.table([run], 2)
    with pytest.raises(SystemExit, match=r"dist-moe shard .* failed:\n.*--quant"):
        convert.convert_once(tmp_path / "source", tmp_path / "store", "q3", "--quant q3", 1)
