"""The promise over real hosts, each with its own files alone: the logits and the text of one rank."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from helpers import same_bits
from helpers.cluster import Cluster
from helpers.launching import Finished
from helpers.tiny_model import TinyModel, random_ids

pytestmark = pytest.mark.cluster

COMMITTED = json.loads((Path(__file__).resolve().parents[1] / "golden" / "same_bits.json").read_text())["q4/f16"]
IDS = ",".join(map(str, random_ids(same_bits.TOKENS, TinyModel().vocabulary)))
Hosts = Callable[[int], Cluster]
Stores = Callable[..., Path]
Shards = Mapping[int, Sequence[int]]
DIST_MOE = (sys.executable, "-m", "dist_moe")
STORY = ("run", "-p", "Once upon a time", "-n", "40", "--temperature", "0", "--quiet")
COMMON = ("--threads", "1", "--stall-timeout", "30")

# What each host has, and its ranks.
OWN_SHARD = [
    ({0: [1], 1: [2]}, (1, 1)),
    ({0: [1], 1: [2]}, (2, 2)),
    ({0: [1], 1: [2]}, (1, 3)),
    ({0: [1], 1: [2], 2: [3]}, (1, 1, 1)),
    ({0: [1], 1: [2], 2: [3]}, (2, 1, 1)),
    ({0: [1], 1: [2], 2: [3], 3: [4]}, (1, 1, 1, 1)),
    ({0: [1], 1: [2], 2: [3], 3: [4]}, (2, 2, 2, 2)),
]
OTHERWISE = [
    ({0: [1, 2, 3], 1: [4]}, (1, 2)),
    ({0: [4, 1], 1: [3, 2]}, (1, 1)),
    ({0: [1, 2, 3], 1: [3, 4]}, (2, 1)),
    ({0: [1, 2, 3, 4], 1: [2]}, (1, 1)),
    ({0: [1, 2, 3, 4], 1: [1, 2, 3, 4]}, (1, 2)),
    ({0: [1, 2], 1: [2], 2: [3, 4, 1]}, (1, 1, 1)),
]


def name(value: object) -> str:
    if isinstance(value, dict):
        return "shards " + " ".join(",".join(map(str, part)) for part in value.values())
    return "ranks " + " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def logits_hash(cluster: Cluster, ranks: Sequence[int], store: Path, *options: str) -> str:
    """SHA-256 over the logits of every position, as the golden file has it."""
    command = (*DIST_MOE, "logits", "-m", store, "--ids", IDS, "-o", cluster.disk / "logits.npy", *COMMON, *options)
    done = cluster.mpirun(ranks, *command)
    assert done.code == 0, done.output
    logits_TV = np.load(cluster.disk_of(0) / "logits.npy")
    return hashlib.sha256(np.ascontiguousarray(logits_TV).tobytes()).hexdigest()


def shard_count(shards: Shards) -> int:
    return max(max(part) for part in shards.values())


@pytest.mark.parametrize("exchange", ["allreduce", "alltoall"])
@pytest.mark.parametrize(("shards", "ranks"), OWN_SHARD + OTHERWISE, ids=name)
def test_the_logits_are_those_of_one_rank(
    shards: Shards, ranks: tuple[int, ...], exchange: str, hosts: Hosts, tiny_stores: Stores
) -> None:
    cluster = hosts(len(ranks))
    store = cluster.give(tiny_stores(shard_count(shards)), shards)
    assert logits_hash(cluster, ranks, store, "--exchange", exchange) == COMMITTED
    assert cluster.left() == []


@pytest.mark.parametrize("exchange", ["allreduce", "alltoall"])
@pytest.mark.parametrize("layout", ["whole", "sliced", "shared"])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 1)], ids=name)
def test_the_logits_with_each_layout(
    ranks: tuple[int, int], layout: str, exchange: str, hosts: Hosts, tiny_stores: Stores
) -> None:
    cluster = hosts(2)
    store = cluster.give(tiny_stores(2, "sliced" if layout == "sliced" else "whole"), {0: [1], 1: [2]})
    assert logits_hash(cluster, ranks, store, "--experts", layout, "--exchange", exchange) == COMMITTED


def tell(cluster: Cluster, ranks: Sequence[int], store: Path, *options: str) -> Finished:
    done = cluster.mpirun(ranks, *DIST_MOE, *STORY, *COMMON, "-m", store, *options)
    assert done.code == 0, done.output
    return done


@pytest.fixture(scope="module")
def story(demo_stores: Stores) -> str:
    """What one rank tells that has all shards."""
    command = [*DIST_MOE, *STORY, *COMMON, "-m", str(demo_stores(4))]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize(("shards", "ranks"), OWN_SHARD[::3] + OTHERWISE[2:3], ids=name)
def test_the_text_is_that_of_one_rank(
    shards: Shards, ranks: tuple[int, ...], hosts: Hosts, demo_stores: Stores, story: str
) -> None:
    cluster = hosts(len(ranks))
    assert tell(cluster, ranks, cluster.give(demo_stores(shard_count(shards)), shards)).stdout == story
    assert cluster.left() == []


@pytest.mark.parametrize(("weights", "ranks"), [("3,1", (1, 1)), ("3,3,2,1", (1, 2, 1, 1))], ids=name)
def test_the_text_with_replicas_for_unequal_hosts(
    weights: str, ranks: tuple[int, ...], hosts: Hosts, demo_stores: Stores, story: str, tmp_path: Path
) -> None:
    placement, store = tmp_path / "placement.json", tmp_path / "placed"
    place = ("place", demo_stores(4), "--weights", weights, "--zipf", "1", "--budget", "1.5x", "-o", placement)
    make = ("shard", "--placement", placement, "-o", store)
    for words in (place, make):
        subprocess.run([*DIST_MOE, *map(str, words)], capture_output=True, check=True, timeout=120)
    cluster = hosts(len(ranks))
    given = cluster.give(store, {host: [host + 1] for host in range(len(ranks))})
    for exchange in ("allreduce", "alltoall"):
        assert tell(cluster, ranks, given, "--exchange", exchange).stdout == story


def test_hosts_have_nothing_in_common_but_the_cable(hosts: Hosts) -> None:
    cluster = hosts(2)
    (cluster.disk_of(0) / "here").touch()
    looks = f"hostname; ls {cluster.disk}; ls /dev/shm | wc -l; grep -c eth0 /proc/net/dev"
    here, there = (cluster.run(host, "sh", "-c", looks).stdout.split() for host in (0, 1))
    assert "here" in here
    assert "here" not in there
    assert (here[0], there[0]) == ("host0", "host1")
    assert here[-2:] == there[-2:] == ["0", "1"]
    before = cluster.received_bytes(1)
    done = cluster.mpirun((1, 1), *DIST_MOE, *STORY, *COMMON)
    assert done.code == 0, done.output
    assert cluster.received_bytes(1) - before > 100_000
