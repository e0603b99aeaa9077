"""A store becomes a GGUF file and comes back: what the other engine runs are the same bits."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.checkpoint.source import open_source
from dist_moe.errors import UsageError
from dist_moe.kernels.formats import ScaleChoice, WeightFormat
from dist_moe.store.carry import default_format
from dist_moe.store.reader import Store
from dist_moe.store.units import UNIT_KINDS
from helpers.tiny_gguf import DENSE, MOE, gguf_tensors
from helpers.tiny_model import TinyModel
from helpers.tiny_store import run_convert

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("store_to_gguf")


@pytest.mark.parametrize("model", [MOE, DENSE])
@pytest.mark.parametrize("fmt", WeightFormat)
def test_there_and_back_again(tmp_path: Path, script: ModuleType, model: TinyModel, fmt: WeightFormat) -> None:
    source = Checkpoint.open(model.write(tmp_path / "hf"))
    run_convert(source, tmp_path / "store", format=fmt)
    before = Store.open(tmp_path / "store")
    script.write_gguf(before, tmp_path / "m.gguf")
    again = open_source(tmp_path / "m.gguf")
    assert default_format(again) == fmt
    run_convert(again, tmp_path / "again", format=fmt)
    after = Store.open(tmp_path / "again")
    for layer in range(model.layers):
        for kind in UNIT_KINDS:
            for index in range(len(before.unit_addresses(kind, layer))):
                assert np.array_equal(before.unit(kind, layer, index), after.unit(kind, layer, index))
    for name in ("embedding", "final_norm", "layers.1.attention_norm", "layers.0.k_norm"):
        assert np.array_equal(before.common(name), after.common(name))
    assert np.array_equal(before.config.inv_freq, after.config.inv_freq)
    for key in ("heads", "kv_heads", "head_dim", "experts_per_token", "vocabulary", "max_positions", "eps"):
        assert getattr(before.config, key) == getattr(after.config, key)


def test_the_other_reader_sees_the_quantized_weights(tmp_path: Path, script: ModuleType) -> None:
    run_convert(Checkpoint.open(MOE.write(tmp_path / "hf")), tmp_path / "store", scales=ScaleChoice.ABSMAX)
    script.write_gguf(Store.open(tmp_path / "store"), tmp_path / "m.gguf")
    originals = gguf_tensors(MOE)
    tensors = GGUFReader(tmp_path / "m.gguf").tensors
    assert {tensor.name for tensor in tensors} == set(originals)
    for tensor in tensors:
        values, original = dequantize(tensor.data, tensor.tensor_type), originals[tensor.name]
        step = 0.0 if tensor.tensor_type.name == "F32" else np.abs(original).max() / 8
        assert np.abs(values - original).max() <= 1.01 * step, tensor.name


def test_other_stores_are_refused(tmp_path: Path, script: ModuleType) -> None:
    run_convert(Checkpoint.open(MOE.write(tmp_path / "hf")), tmp_path / "store", group_size=64)
    with pytest.raises(UsageError, match="has q4 weights in groups of 64; expected groups of 32"):
        script.write_gguf(Store.open(tmp_path / "store"), tmp_path / "m.gguf")
