"""Nodes with other ranks and other shards each: the same bits as one rank; and what is said where something lacks."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.kernels import WeightFormat
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from helpers import uneven_nodes
from helpers.tiny_model import TinyModel

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = json.loads((ROOT / "golden" / "same_bits.json").read_text())["q4/f16"]
SHARDS = 4


@pytest.fixture(scope="module", params=["whole", "sliced"])
def stores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for every set of shards, with those shards alone."""
    source = Checkpoint.open(TinyModel().write(tmp_path_factory.mktemp("tiny")))
    directory = tmp_path_factory.mktemp("stores")
    whole = directory / "0-1-2-3"
    options = StoreOptions(format=WeightFormat.Q4, nodes=SHARDS, experts=request.param)
    convert(source, whole, options, lambda *told: None)
    for count in range(1, SHARDS):
        for kept in itertools.combinations(range(SHARDS), count):
            with_only(whole, directory / "-".join(map(str, kept)), kept)
    return directory


def with_only(whole: Path, there: Path, kept: tuple[int, ...]) -> Path:
    """A host's own directory: some shards and what every rank needs, not the texts."""
    there.mkdir()
    names = [f"shard-{shard + 1:05d}-of-{SHARDS:05d}.safetensors" for shard in kept]
    for name in ("manifest.json", "common.safetensors", *names):
        os.link(whole / name, there / name)
    return there


@pytest.mark.parametrize("ranks", sorted(uneven_nodes.CASES))
def test_nodes_with_some_of_the_shards_give_the_committed_bits(ranks: int, stores: Path, mpirun) -> None:
    command = (sys.executable, ROOT / "helpers" / "uneven_nodes.py", stores)
    alone = mpirun(1, *command, timeout_s=100)
    assert alone.code == 0, alone.output
    (expected, *_) = json.loads(alone.stdout.splitlines()[-1]).values()
    assert expected["logits"] == COMMITTED
    assert expected["kv"] == expected["restored kv"]
    done = mpirun(ranks, *command, env={"DIST_MOE_YIELD": "1"}, timeout_s=280)
    assert done.code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 * len(uneven_nodes.CASES[ranks])
    for name, hashes in found.items():
        del hashes["layout"]
        assert hashes == {key: expected[key] for key in hashes}, name
