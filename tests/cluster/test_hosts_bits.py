"""The promise over real hosts, each with its own shard alone: the logits and the text of one rank."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.cluster import Cluster

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = json.loads((ROOT / "golden" / "same_bits.json").read_text())["q4/f16"]
Hosts = Callable[[int], Cluster]
Stores = Callable[[int], Path]
# Shards by host, and ranks by host.
PLACES = [
    ({0: [1], 1: [2]}, (1, 1)),
    ({0: [1], 1: [2]}, (2, 2)),
    ({0: [1], 1: [2], 2: [3]}, (1, 1, 1)),
    ({0: [1], 1: [2], 2: [3], 3: [4]}, (1, 1, 1, 1)),
    ({0: [1], 1: [2], 2: [3], 3: [4]}, (2, 2, 2, 2)),
]
LOGITS = [
    *((*place, layout) for place in PLACES for layout in ("whole", "sliced") if max(place[1]) == 1),
]
STORY = ("run", "-p", "Once upon a time", "-n", "40", "--temperature", "0", "--threads", "1", "--quiet", "-m")


def name(value: object) -> str:
    if isinstance(value, dict):
        return "shards " + " ".join(",".join(map(str, part)) for part in value.values())
    return "ranks " + " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(("shards", "ranks", "layout"), LOGITS, ids=name)
def test_the_logits_are_those_of_one_rank(
    shards: dict[int, list[int]],
    ranks: tuple[int, ...],
    layout: str,
    hosts: Hosts,
    tiny_stores: Callable[[int, str], Path],
) -> None:
    cluster = hosts(len(ranks))
    store = cluster.give(tiny_stores(max(max(part) for part in shards.values()), layout), shards)
    done = cluster.mpirun(ranks, sys.executable, ROOT / "helpers" / "hosts_bits.py", store, layout)
    assert done.code == 0, done.output
    found = json.loads(done.stdout)
    assert found["hosts"] == [host for host, count in zip(cluster.hosts, ranks, strict=True) for _ in range(count)]
    assert set(found["hashes"].values()) == {COMMITTED}, found


@pytest.fixture(scope="module")
def story(demo_stores: Stores) -> str:
    """What one rank tells that has all shards."""
    command = [sys.executable, "-m", "dist_moe", *STORY, str(demo_stores(2))]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize(("experts", "exchange"), [("auto", "auto"), ("whole", "auto"), ("auto", "alltoall")])
@pytest.mark.parametrize(("shards", "ranks"), PLACES, ids=name)
def test_the_text_is_that_of_one_rank(
    shards: dict[int, list[int]],
    ranks: tuple[int, ...],
    experts: str,
    exchange: str,
    hosts: Hosts,
    demo_stores: Stores,
    story: str,
) -> None:
    cluster = hosts(len(ranks))
    store = cluster.give(demo_stores(max(max(part) for part in shards.values())), shards)
    done = cluster.mpirun(
        ranks, sys.executable, "-m", "dist_moe", *STORY, store, "--experts", experts, "--exchange", exchange
    )
    assert done.code == 0, done.output
    assert done.stdout == story, done.output
    assert cluster.left() == []


def test_ranks_that_have_nothing_in_common_but_a_cable(hosts: Hosts) -> None:
    cluster = hosts(2)
    (cluster.disk_of(0) / "here").touch()
    looks = f"hostname; ls {cluster.disk}; ls /dev/shm | wc -l; cat /proc/net/dev | grep -c eth0"
    before = cluster.received_bytes(1)
    here, there = (cluster.run(host, "sh", "-c", looks).stdout.split() for host in (0, 1))
    assert "here" in here
    assert "here" not in there
    assert (here[0], there[0]) == ("host0", "host1")
    assert here[-2:] == there[-2:] == ["0", "1"]
    done = cluster.mpirun((1, 1), sys.executable, "-m", "dist_moe", *STORY[:-1])
    assert done.code == 0, done.output
    assert cluster.received_bytes(1) - before > 100_000
