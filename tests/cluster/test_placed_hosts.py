"""A placed store over real hosts: experts on several of them, unequal weights, the bits of one rank."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.cluster import Cluster

pytestmark = pytest.mark.cluster

# Long enough that the work on an expert is split by tokens between the hosts that hold it.
LONG = "Once upon a time, a quiet girl named Anna had a little dog. " * 16
STORY = ("run", "-p", "Once upon a time", "-n", "40", "--temperature", "0", "--threads", "1", "--quiet", "-m")


def dist_moe(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "dist_moe", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=True, timeout=120, text=True).stdout


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`placed(weights, budget)`: the demo model, placed under an assumed skew."""
    directory = tmp_path_factory.mktemp("placed")

    def store_of(weights: str, budget: str) -> Path:
        store, placement = directory / f"{weights}-{budget}", directory / f"{weights}-{budget}.json"
        if not store.exists():
            dist_moe("place", "--weights", weights, "--budget", budget, "--zipf", "1", "-o", placement)
            dist_moe("shard", "--placement", placement, "-o", store)
        return store

    return store_of


@pytest.mark.parametrize("exchange", ["allreduce", "alltoall"])
@pytest.mark.parametrize(
    ("weights", "budget", "ranks"),
    [
        ("1,1", "2x", (1, 1)),
        ("3,2,1", "1.5x", (1, 2, 1)),
        ("3,3,2,1", "2x", (1, 1, 1, 1)),
        ("1,1,1,1", "1x", (1, 1, 1, 1)),
    ],
)
def test_the_story_is_that_of_one_rank(
    weights: str,
    budget: str,
    ranks: tuple[int, ...],
    exchange: str,
    hosts: Callable[[int], Cluster],
    placed: Callable[[str, str], Path],
) -> None:
    store = placed(weights, budget)
    cluster = hosts(len(ranks))
    given = cluster.give(store, {host: [host + 1] for host in range(len(ranks))})
    done = cluster.mpirun(ranks, sys.executable, "-m", "dist_moe", *STORY, given, "--exchange", exchange)
    assert done.code == 0, done.output
    assert done.stdout == dist_moe(*STORY, store)


def test_the_same_shard_on_two_hosts_is_a_replica(
    hosts: Callable[[int], Cluster], placed: Callable[[str, str], Path]
) -> None:
    store = placed("1,1", "2x")
    given = hosts(3).give(store, {0: [1], 1: [2], 2: [1]})
    done = hosts(3).mpirun((1, 1, 1), sys.executable, "-m", "dist_moe", *STORY, given)
    assert done.code == 0, done.output
    assert done.stdout == dist_moe(*STORY, store)


@pytest.mark.parametrize("exchange", ["allreduce", "alltoall"])
def test_a_long_prompt_whose_tokens_are_split_between_replicas_gives_the_same_text(
    exchange: str, hosts: Callable[[int], Cluster], placed: Callable[[str, str], Path]
) -> None:
    store = placed("3,2,1", "2x")
    words = ("run", "-p", LONG, "-n", "10", "--temperature", "0", "--threads", "1", "--quiet", "-m")
    given = hosts(3).give(store, {0: [1], 1: [2], 2: [3]})
    done = hosts(3).mpirun((1, 2, 1), sys.executable, "-m", "dist_moe", *words, given, "--exchange", exchange)
    assert done.code == 0, done.output
    assert done.stdout == dist_moe(*words, store)


def test_weights_are_measured_on_the_hosts(hosts: Callable[[int], Cluster]) -> None:
    words = ("place", "--weights", "measured", "--simulate", "--json")
    done = hosts(2).mpirun((1, 1), sys.executable, "-m", "dist_moe", *words)
    assert done.code == 0, done.output
    weights = [node["weight"] for node in json.loads(done.stdout)["nodes"]]
    assert len(weights) == 2
    assert min(weights) == 10
    assert "measured: 1 host0: " in done.stderr
    assert ", 2 host1: " in done.stderr
