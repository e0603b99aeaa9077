"""Nodes with other ranks and other shards each: the same bits as one rank; and what is said where something lacks."""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
from pathlib import Path

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.kernels import ScaleChoice, WeightFormat
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from helpers import launching, uneven_nodes
from helpers.launching import Finished
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
    options = StoreOptions(format=WeightFormat.Q4, nodes=SHARDS, experts=request.param, scales=ScaleChoice.ABSMAX)
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


@pytest.fixture(scope="module")
def of_one_rank(stores: Path) -> dict[str, str]:
    """The hashes of one rank with all shards."""
    alone = launching.mpirun(1, *program(stores), timeout_s=100)
    assert alone.code == 0, alone.output
    (hashes, *_) = json.loads(alone.stdout.splitlines()[-1]).values()
    return dict(hashes)


def program(stores: Path) -> tuple[object, ...]:
    return sys.executable, ROOT / "helpers" / "uneven_nodes.py", stores


@pytest.mark.parametrize("ranks", sorted(uneven_nodes.CASES))
def test_nodes_with_some_of_the_shards_give_the_committed_bits(
    ranks: int, stores: Path, of_one_rank: dict[str, str], mpirun
) -> None:
    command, expected = program(stores), of_one_rank
    assert expected["logits"] == expected["logits by alltoall"] == COMMITTED
    assert expected["kv"] == expected["restored kv"]
    done = mpirun(ranks, *command, env={"DIST_MOE_YIELD": "1"}, timeout_s=280)
    assert done.code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(uneven_nodes.WAYS) * len(uneven_nodes.CASES[ranks])
    for name, hashes in found.items():
        del hashes["layout"]
        assert hashes == {key: expected[key] for key in hashes}, name


PROGRAM = (sys.executable, str(ROOT / "helpers" / "split_host.py"))
RUN = ("run", "--prompt-ids", "1,2,3", "-n", "4", "--threads", "1")


def start(mpirun, stores: Path, nodes: str, *shards: str, options: tuple[str, ...] = ()) -> Finished:
    """One rank with each of these sets of shards, on nodes as `nodes` says; rank 0's has the texts."""
    parts = [(":", "-n", "1", *PROGRAM, nodes, *RUN, *options, "-m", str(stores / own)) for own in shards]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        source, there = stores / "0-1-2-3" / name, stores / shards[0] / name
        if source.exists() and not there.exists():
            os.link(source, there)
    return mpirun(1, *list(itertools.chain(*parts))[3:], env={"DIST_MOE_YIELD": "1"})


def errors(done: Finished) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("dist-moe: error: ")]


def test_each_host_gives_its_own_directory(stores: Path, mpirun) -> None:
    alone = start(mpirun, stores, "0", "0-1-2-3")
    assert alone.code == 0, alone.output
    done = start(mpirun, stores, "0,1,1", "0-2", "1-3", "1-3")
    assert done.code == 0, done.output
    assert done.stdout == alone.stdout != ""


def test_shards_that_no_host_has_are_named_with_what_they_hold(stores: Path, mpirun) -> None:
    done = start(mpirun, stores, "0,1", "0", "0-2")
    assert done.code == 2, done.output
    found = errors(done)
    assert len(found) == 2
    for line, shard, heads, block in zip(found, (1, 3), ("2-3", "6-7"), ("1", None), strict=True):
        name = f"shard-{shard + 1:05d}-of-00004.safetensors"
        assert f"{stores / '0' / name} is missing on " in line
        host = socket.gethostname()
        assert f" on {host}-0, {host}-1: it holds query heads {heads}, " in line
        assert (f"vocabulary block {block}," in line) == (block is not None)
        assert f"scp MACHINE:STORE/{name} {host}-0:{stores / '0'}/" in line
        assert "dist-moe shard " in line


def test_ranks_of_one_host_that_see_different_files(stores: Path, mpirun) -> None:
    done = start(mpirun, stores, "0,0", "0-1-2", "0-1-2-3")
    assert done.code == 2, done.output
    (line,) = errors(done)
    assert "ranks 0 and 1 on " in line
    assert line.endswith(
        "see different shard files: rank 1 has shard-00004-of-00004.safetensors, rank 0 has not; "
        "give all ranks of a host the same -m"
    )


def test_a_store_here_and_a_checkpoint_there(stores: Path, mpirun, tmp_path: Path) -> None:
    TinyModel().write(stores / "checkpoint")
    done = start(mpirun, stores, "0,1", "0-1-2-3", "checkpoint")
    assert done.code == 2, done.output
    (line,) = errors(done)
    assert "has a store" in line
    assert line.endswith("give every host the model in one form")
