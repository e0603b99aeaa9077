"""Random nodes, holdings, speeds, layouts and steps, some of whose tokens fail: what one rank says, to the bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.kernels import WeightFormat
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from helpers.launching import Finished
from helpers.tiny_model import Floats, TinyModel

ROOT = Path(__file__).resolve().parents[1]
MODEL = TinyModel(layers=4, kv_heads=4)
SEEDS = 12


def unchanged(tensors: dict[str, Floats]) -> None:
    """The model as it is."""


def with_nan(tensors: dict[str, Floats]) -> None:
    """A NaN in one expert."""
    tensors["model.layers.0.mlp.experts.3.up_proj.weight"][5, 7] = np.nan


def with_infinity(tensors: dict[str, Floats]) -> None:
    """Some tokens whose embedding is infinite."""
    tensors["model.embed_tokens.weight"][10:20, 3] = np.inf


def too_large(tensors: dict[str, Floats]) -> None:
    """Contributions, and sums of contributions, that are out of range for some tokens."""
    for name, factor in (("layers.1.mlp.down_proj", 4e4), ("layers.2.self_attn.o_proj", 3e5)):
        tensors[f"model.{name}.weight"] *= np.float32(factor)
    for expert in range(MODEL.experts):
        tensors[f"model.layers.3.mlp.experts.{expert}.down_proj.weight"] *= np.float32(1e5)


CHANGES = {"f32": (with_nan, too_large), "q4": (unchanged, with_infinity, too_large), "q8": (with_infinity,)}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store for each format and change."""
    directory = tmp_path_factory.mktemp("stores")
    for weights, changes in CHANGES.items():
        for change in changes:
            source = MODEL.write(tmp_path_factory.mktemp("source"))
            tensors = load_file(source / "model.safetensors")
            change(tensors)
            save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
            options = StoreOptions(format=WeightFormat.parse(weights), allow_nonfinite=True)
            convert(Checkpoint.open(source), directory / f"{weights} {change.__name__}", options, lambda *told: None)
    return directory


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_bits_and_faults_are_those_of_one_rank(ranks: int, stores: Path, mpirun: Callable[..., Finished]) -> None:
    command = (sys.executable, ROOT / "helpers" / "random_plans.py", stores, str(100 * ranks), str(100 * ranks + SEEDS))
    done = mpirun(ranks, *command, env={"DIST_MOE_YIELD": "1"}, timeout_s=280)
    assert done.code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["faults"] > 100
