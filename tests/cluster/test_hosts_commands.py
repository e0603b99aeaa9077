"""Commands over several hosts: what is missing is named, and doctor, prompt caches and chat work from any host."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import launching
from helpers.cluster import Cluster

pytestmark = pytest.mark.cluster

DIST_MOE = (sys.executable, "-m", "dist_moe")
STORY = ("run", "-p", "Once upon a time", "-n", "12", "--temperature", "0", "--quiet", "--threads", "1")
Hosts = Callable[[int], Cluster]
Stores = Callable[[int], Path]


def test_a_missing_shard_is_named_with_its_hosts(hosts: Hosts, demo_stores: Stores) -> None:
    cluster = hosts(3)
    store = cluster.give(demo_stores(4), {0: [1], 1: [1, 2], 2: [4]})
    done = cluster.mpirun((1, 1, 1), *DIST_MOE, *STORY, "-m", store)
    assert done.code == 2, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dist-moe: ")]
    assert line.startswith(
        f"dist-moe: error: {store}/shard-00003-of-00004.safetensors is missing on host0, host1, host2: "
    )
    assert "experts 8-11 of layers 0-3" in line
    assert cluster.left() == []


def test_a_damaged_shard_is_named_with_its_host(hosts: Hosts, demo_stores: Stores) -> None:
    cluster = hosts(2)
    store = cluster.give(demo_stores(2), {0: [1], 1: [2]})
    shard = cluster.disk_of(1) / store.name / "shard-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-64])
    done = cluster.mpirun((1, 1), *DIST_MOE, *STORY, "-m", store)
    assert done.code == 2, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dist-moe: ")]
    assert line.startswith("dist-moe: error: rank 1 on host1, "), done.output
    assert "shard-00002-of-00002.safetensors" in line


def test_doctor_looks_into_every_host(hosts: Hosts, demo_stores: Stores) -> None:
    cluster = hosts(2)
    store = cluster.give(demo_stores(2), {0: [1], 1: [2]})
    words = ("doctor", "-m", store, "--hostfile", cluster.hostfile((1, 1)))
    done = cluster.mpirun((1, 1), *DIST_MOE, *words)
    assert done.code in (0, 3), done.output
    assert "host0" in done.stdout, done.output
    assert "host1" in done.stdout, done.output
    assert "no rank runs there" not in done.output


def test_a_prompt_cache_of_two_hosts_serves_one(hosts: Hosts, demo_stores: Stores) -> None:
    cluster = hosts(2)
    store = cluster.give(demo_stores(2), {0: [1, 2], 1: [2]})
    cache = ("--prompt-cache", cluster.disk / "prompt.cache")
    first = cluster.mpirun((1, 1), *DIST_MOE, *STORY, "-m", store, *cache)
    assert first.code == 0, first.output
    assert (cluster.disk_of(0) / "prompt.cache").exists()
    again = cluster.mpirun((2, 1), *DIST_MOE, *STORY, "-m", store, *cache)
    alone = cluster.run(0, *DIST_MOE, *STORY, "-m", store, *cache)
    assert first.stdout == again.stdout == alone.stdout, again.output + alone.output


def test_chat_from_a_host_that_has_no_rank(hosts: Hosts, demo_stores: Stores) -> None:
    """The user sits on host 2; ranks, and rank 0 among them, are on hosts 0 and 1."""
    cluster = hosts(3)
    store = cluster.give(demo_stores(2), {0: [1], 1: [2], 2: [1, 2]})
    command = (*DIST_MOE, "chat", "--ranks", "2", "--hostfile", cluster.hostfile((1, 1, 0)), "-m", store)
    words = cluster.on(2, *command, "--temperature", "0", "-n", "8")
    env = launching.child_environment({**cluster.environment(), **cluster.launcher_variables()})
    done = subprocess.run(
        words, input="Once upon a time\n", capture_output=True, text=True, timeout=90, env=env, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), done.stderr
    assert cluster.left() == []
