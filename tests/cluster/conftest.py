"""Hosts on one machine, and stores of the demo model and of a tiny one that are cut into shards for them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.kernels import ScaleChoice, WeightFormat
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from helpers.cluster import Cluster
from helpers.tiny_model import TinyModel


@pytest.fixture(scope="module")
def hosts() -> Iterator[Callable[[int], Cluster]]:
    """`hosts(n)`: a cluster of n hosts, made once per module."""
    made: dict[int, Cluster] = {}

    def cluster_of(count: int) -> Cluster:
        if count not in made:
            made[count] = Cluster(count)
        return made[count]

    yield cluster_of
    for cluster in made.values():
        cluster.close()


@pytest.fixture(scope="session")
def demo_stores(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`demo_stores(n)`: the demo model in n shards."""
    directory = tmp_path_factory.mktemp("demo")

    def store_of(shards: int) -> Path:
        store = directory / f"demo-{shards}"
        if not store.exists():
            command = [sys.executable, "-m", "dist_moe", "shard", "--nodes", str(shards), "-o", str(store)]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
        return store

    return store_of


@pytest.fixture(scope="session")
def tiny_stores(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_stores(n, layout)`: the model of tests/golden/same_bits.json in n shards, cut for a layout of experts."""
    directory = tmp_path_factory.mktemp("tiny")
    source = Checkpoint.open(TinyModel().write(directory / "checkpoint"))

    def store_of(shards: int, layout: str = "whole") -> Path:
        store = directory / f"q4-{shards}-{layout}"
        if not store.exists():
            options = StoreOptions(
                format=WeightFormat.parse("q4"), nodes=shards, experts=layout, scales=ScaleChoice.ABSMAX
            )
            convert(source, store, options, lambda done, total, what: None)
        return store

    return store_of
