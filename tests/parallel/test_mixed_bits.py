"""A store of several formats: the same promise, one hash of all logits, and values near those of a store in f32."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.engine.start.startup import open_exchange
from dist_moe.kernels import Kernels, KvFormat, MatrixFormat, ScaleChoice, WeightFormat, isa_levels
from dist_moe.parallel.launcher import Launcher
from dist_moe.parallel.world import World
from dist_moe.store.convert import convert
from dist_moe.store.decoded import DecodedStore
from dist_moe.store.formats import LayerFormats, ModelFormats
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from helpers.same_bits import TOKENS, run_store, steps
from helpers.tiny_model import TinyModel

HELPER = Path(__file__).resolve().parents[1] / "helpers" / "mixed_bits.py"
COMMITTED = "8367d33c160710d9eaa263a9b5223140c339d916e18ac824d8e5bcabfe4229c1"
F32, BF16 = MatrixFormat(WeightFormat.F32, 0), MatrixFormat(WeightFormat.BF16, 0)
Q8, Q8_32 = MatrixFormat(WeightFormat.Q8, 64), MatrixFormat(WeightFormat.Q8, 32)
Q4, Q4_32 = MatrixFormat(WeightFormat.Q4, 64), MatrixFormat(WeightFormat.Q4, 32)
MODEL = TinyModel(layers=3, dense_hidden=192)  # layer 1 is dense
FORMATS = ModelFormats(
    (
        LayerFormats(Q8, BF16, Q4_32, Q8_32, (Q4, F32, Q8, BF16) * 2, (Q8, Q4_32, F32, BF16, Q4, Q4, Q8_32, Q8)),
        LayerFormats(F32, BF16, F32, Q4_32, (BF16,), (Q8_32,)),
        LayerFormats(Q4, Q4, Q8, F32, (Q4_32,) * 8, (Q8,) * 7 + (BF16,)),
    ),
    Q8_32,
)


def stored(directory: Path, name: str, options: StoreOptions) -> Path:
    source = Checkpoint.open(MODEL.write(directory / "source"))
    convert(source, directory / name, replace(options, scales=ScaleChoice.ABSMAX), lambda done, total, what: None)
    return directory / name


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("mixed"), "mixed", StoreOptions(formats=FORMATS))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_combination_gives_the_committed_bits(ranks: int, mixed: Path, mpirun) -> None:
    result = mpirun(ranks, sys.executable, HELPER, mixed, timeout_s=120)
    assert result.code == 0, result.stderr
    hashes = json.loads(result.stdout.splitlines()[-1])
    wrong = [combination for combination, found in hashes.items() if found != COMMITTED]
    assert not wrong, f"{ranks} ranks: {len(wrong)} of {len(hashes)}, such as {wrong[0]}: {hashes[wrong[0]]}"
    assert len(hashes) >= (18 if ranks > 1 else 12 + 6 * len(isa_levels()))


def logits(directory: Path) -> npt.NDArray[np.float32]:
    """Of every position, on one rank."""
    store, world, rows = Store.open(directory), World.start(Launcher()), []
    exchange = open_exchange(world, 0, {})
    with Kernels(1) as kernels:
        worker = run_store(world, exchange, store, kernels, "whole", KvFormat.F32)
        for step in steps(TOKENS, False, store.config.vocabulary):
            worker.run(step, lambda rows_NV: rows.append(rows_NV.copy()))
    return np.concatenate(rows)


def test_the_values_are_those_of_the_decoded_weights_in_f32(mixed: Path, tmp_path: Path) -> None:
    """Int8 activations alone stand between the two."""
    directory = tmp_path / "decoded"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MODEL.config_json()))
    with Kernels(1) as kernels:
        decoded = DecodedStore(Store.open(mixed), kernels)
        tensors = {decoded.tensor(name): decoded.whole(name) for name in decoded.names()}
    save_file(tensors, directory / "model.safetensors")
    convert(Checkpoint.open(directory), tmp_path / "f32", StoreOptions(format=WeightFormat.F32), lambda *_: None)
    expected, found = logits(tmp_path / "f32"), logits(mixed)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < 0.07  # of this model in q8 throughout: 0.03, in q4: 0.04
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9
