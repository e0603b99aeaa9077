"""Who holds which units, by the shard files of each node; what is said of those that nobody holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_moe.engine.start.inventory import Inventory, holdings_of, missing_units, plan_from_inventory
from dist_moe.errors import StoreError
from dist_moe.parallel.world import World
from dist_moe.store.manifest import Manifest
from dist_moe.store.reader import Store
from dist_moe.store.units import unit_count
from helpers.tiny_model import TinyModel

SHARDS = 4


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of each kind."""
    return TinyModel(layers=3, dense_layers=(1,), vocabulary=600).write(tmp_path_factory.mktemp("inventory"))


@pytest.fixture(params=["whole", "sliced"])
def store(request: pytest.FixtureRequest, make_store, source: Path) -> Store:
    return make_store(source, "q4", nodes=SHARDS, experts=request.param)


def inventory_of(*shards: set[int]) -> Inventory:
    hosts = tuple(f"node{i}" for i in range(1, len(shards) + 1))
    return Inventory(hosts, tuple(f"/data/{host}" for host in hosts), tuple(map(frozenset, shards)))


def sentences(manifest: Manifest, *shards: set[int]) -> list[str]:
    inventory = inventory_of(*shards)
    return list(missing_units(manifest, holdings_of(manifest, inventory.shards), inventory))


def test_a_node_holds_what_its_shards_hold(store: Store, tmp_path: Path) -> None:
    """Against a directory that has these files alone."""
    for name in ("manifest.json", "common.safetensors", "shard-00002-of-00004.safetensors"):
        (tmp_path / name).hardlink_to(store.directory / name)
    there, manifest = Store.open(tmp_path, with_text=False), store.manifest
    held = holdings_of(manifest, [frozenset({1}), frozenset(range(SHARDS))])
    for kind, layer, held_NU in [
        ("head", 0, held.heads_NH),
        ("kv_head", 0, held.kv_heads_NG),
        ("vocabulary", 0, held.vocabulary_NB),
        *(("chunk", layer, held.chunks_NC[layer]) for layer in range(3)),
    ]:
        assert np.flatnonzero(held_NU[0]).tolist() == there.present_units(kind, layer).tolist()
        assert held_NU[1].all()
        assert held_NU.shape[1] == unit_count(manifest.config, manifest.group_size, kind, layer)


@pytest.mark.parametrize("shards", [[{0, 1, 2, 3}], [{0, 2}, {1, 3}], [{3}, {0, 1}, {1, 2}], [set(), {0, 1, 2, 3}]])
def test_nothing_is_said_where_every_unit_is_somewhere(store: Store, shards: list[set[int]]) -> None:
    assert sentences(store.manifest, *shards) == []


def test_a_missing_shard_is_named_with_its_units_hosts_and_what_brings_it(make_store, source: Path) -> None:
    manifest = make_store(source, "q4", nodes=SHARDS).manifest
    (line,) = sentences(manifest, {0, 1}, {3})
    name = "shard-00003-of-00004.safetensors"
    assert line.startswith(
        f"/data/node2/{name} is missing on node1, node2: it holds query heads 4-5, vocabulary block 3, "
        "experts 4-5 of layers 0, 2, chunk 3 of layer 1, which no other file of this job has; copy it from where it "
        f"is: scp MACHINE:STORE/{name} node2:/data/node2/, or make it there: dist-moe shard "
    )


def test_experts_of_which_a_part_is_missing(make_store, source: Path) -> None:
    manifest = make_store(source, "q4", nodes=SHARDS, experts="sliced").manifest
    (line,) = sentences(manifest, {0, 1, 2})
    assert "chunks of experts 2-3, 6-7 of layers 0, 2" in line


def test_a_query_head_without_its_kv_head_on_the_same_host(store: Store) -> None:
    """Heads 0 and 1 are on one host, and their KV head is on another: stores are not cut so."""
    first, second, *others = store.manifest.shards
    manifest = replace(store.manifest, shards=(replace(first, kv_heads=()), second, *others))
    (line,) = sentences(manifest, {0}, {1, 2, 3})
    assert line.startswith("query heads 0-1: no host of this job (node1, node2) has that with all that it needs")


def test_what_is_missing_ends_the_start(store: Store) -> None:
    with pytest.raises(StoreError, match=r"shard-00001-of-00004.*\n.*shard-00004-of-00004"):
        plan_from_inventory(World(), store.manifest, inventory_of({1, 2}), "auto")
