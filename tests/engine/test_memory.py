"""What a run needs, against what it then takes; what a host has; and who is told when that is not enough."""

from __future__ import annotations

import logging
import os
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dist_moe.engine.requests.request import Request
from dist_moe.engine.start.agreement import StartRecord
from dist_moe.engine.start.available_memory import AvailableMemory, available_memory, is_in_memory
from dist_moe.engine.start.inventory import Inventory, holdings_of, plan_from_inventory
from dist_moe.engine.start.memory import Demand, check_memory, has_room, host_need
from dist_moe.kernels import KvFormat, Operand, SumsCodec, WireFormat
from dist_moe.model.workspace import workspace_bytes
from dist_moe.parallel import token_exchange
from dist_moe.parallel.cost import LinkCosts
from dist_moe.parallel.holdings import everything_held
from dist_moe.parallel.host_sums import HostSums
from dist_moe.parallel.plan import EXPERT_LAYOUTS, Plan, plan_job
from dist_moe.parallel.world import AgreedError, World
from dist_moe.store.placement import indices_of
from dist_moe.store.reader import Store
from dist_moe.store.unit_parts import unit_bytes
from dist_moe.store.units import UNIT_KINDS
from helpers.plans import job_of
from helpers.start_record import RECORD
from helpers.tiny_model import TinyModel, random_ids

DEMAND = Demand(KvFormat.F16, 130, 64)
NONE = np.empty(0, np.int64)


def plans_of(store: Store, ranks: int, layout: str = "whole") -> list[Plan]:
    return list(job_of(store, ranks, layout).plans)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of each kind, so that sizes occur more than once."""
    return TinyModel(layers=5, dense_layers=(1, 2)).write(tmp_path_factory.mktemp("memory"))


@pytest.fixture(params=["f32", "bf16", "q8", "q4"])
def store(request: pytest.FixtureRequest, make_store, source: Path) -> Store:
    return make_store(source, request.param)


def arrays_of(workspace: object) -> list[np.ndarray]:
    """Every array of a workspace, those inside operands and chunk lists too."""
    found = []
    for entry in fields(workspace):  # type: ignore[arg-type]
        value = getattr(workspace, entry.name)
        if isinstance(value, Operand):
            found += [value.x_TC, value.q_TC, value.scale_TG, value.sum_TG]
        elif isinstance(value, np.ndarray):
            found.append(value)
        elif entry.name == "chunks":
            found.append(value.words)
    return found


def test_the_buffers_are_those_that_a_step_has(store: Store, make_engine) -> None:
    engine = make_engine(store, prefill_chunk=37)
    workspace = engine.model._workspace
    (plan,) = plans_of(store, 1)
    found = workspace_bytes(
        store.config,
        plan,
        quantized=engine.model.share.quantized,
        max_tokens=workspace.max_tokens,
        max_chunks=workspace.chunks.capacity,
    )
    assert found == sum(array.nbytes for array in arrays_of(workspace))


@pytest.mark.parametrize("kv", KvFormat)
def test_the_kv_cache_is_what_a_full_context_takes(store: Store, make_engine, kv: KvFormat) -> None:
    engine = make_engine(store, context=130, kv=kv)
    need = host_need(store.manifest, plans_of(store, 1), [1], Demand(kv, 130, 64))
    engine.generate([Request(random_ids(120, 300), 10, stop_ids=frozenset())])
    assert engine.model.cache.allocated_bytes == need.kv_bytes


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_all_ranks_of_one_host_need_the_store_once(store: Store, ranks: int, layout: str) -> None:
    manifest, config = store.manifest, store.config
    need = host_need(manifest, plans_of(store, ranks, layout), [1] * ranks, DEMAND)
    units_bytes = sum(
        len(store.present_units(kind, layer)) * unit_bytes(manifest, kind, layer, 0)
        for kind in UNIT_KINDS
        for layer in range(config.layers if kind != "vocabulary" else 1)
    )
    assert need.weights_bytes == units_bytes + manifest.files[0].file_bytes
    assert need.active_bytes < need.weights_bytes
    assert need.least_bytes < need.full_bytes


@pytest.mark.parametrize("layout", ["whole", "sliced"])
def test_hosts_divide_the_weights(store: Store, layout: str) -> None:
    plans = plans_of(store, 4, layout)
    common_bytes = store.manifest.files[0].file_bytes
    whole = host_need(store.manifest, plans, [1] * 4, DEMAND)
    halves = [host_need(store.manifest, plans[i : i + 2], [1] * 2, DEMAND) for i in (0, 2)]
    assert sum(half.weights_bytes - common_bytes for half in halves) == whole.weights_bytes - common_bytes
    assert sum(half.kv_bytes for half in halves) == whole.kv_bytes


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_a_host_counts_what_its_own_shards_hold(make_store, source: Path, layout: str) -> None:
    """Host a has shards 1 and 3 of four, host b the other two: each maps the bytes of its units and the common file."""
    manifest = make_store(source, "q4", nodes=4).manifest
    shards = (frozenset({0, 2}), frozenset({1, 3}))
    held = holdings_of(manifest, shards)
    job = plan_job(manifest.config, manifest.group_size, layout, node_of_rank=[0, 0, 1], holdings=held)
    common_bytes = manifest.files[0].file_bytes
    for node, numbers in enumerate(shards):
        units_bytes = sum(
            len(set().union(*(indices_of(manifest.shards[shard].runs(kind, layer)).tolist() for shard in numbers)))
            * unit_bytes(manifest, kind, layer, 0)
            for kind in UNIT_KINDS
            for layer in range(manifest.config.layers if kind != "vocabulary" else 1)
        )
        plans = job.of_node(node)
        assert host_need(manifest, plans, [1] * len(plans), DEMAND).weights_bytes == units_bytes + common_bytes


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_layers_that_are_placed_differently_are_counted_each(store: Store, layout: str) -> None:
    """Host b holds all experts of the first routed layer, and one chunk in three of the other layers."""
    manifest, config = store.manifest, store.config
    everything = everything_held(config, manifest.group_size, 2)
    chunks_NC = [held_NC.copy() for held_NC in everything.chunks_NC]
    for held_NC in chunks_NC[1:]:
        held_NC[1, np.arange(held_NC.shape[1]) % 3 > 0] = False
    held = replace(everything, chunks_NC=tuple(chunks_NC))
    job = plan_job(config, manifest.group_size, layout, node_of_rank=[0, 1, 1], holdings=held)
    plans = job.of_node(1)
    chunk_bytes = sum(
        len(set().union(*(plan.readable_chunks(layer).tolist() for plan in plans)))
        * unit_bytes(manifest, "chunk", layer, 0)
        for layer in range(config.layers)
    )
    without = [replace(plan, _readable=(NONE,) * config.layers) for plan in plans]
    others_bytes = host_need(manifest, without, [1, 1], DEMAND).weights_bytes
    assert host_need(manifest, plans, [1, 1], DEMAND).weights_bytes == others_bytes + chunk_bytes


def test_messages_between_hosts_are_counted_where_they_are_kept(store: Store) -> None:
    """Three hosts, the first with two ranks: its first rank alone keeps room for sums and tokens of all hosts."""
    plans = [[replace(plan, nodes=nodes) for plan in plans_of(store, 2)] for nodes in (1, 3)]
    large = replace(DEMAND, step_tokens=65536)
    alone, among = (host_need(store.manifest, some, [1, 1], large).buffer_bytes for some in plans)
    costs = LinkCosts(1e-6, 1e12)
    links: Any = SimpleNamespace(hosts=3, host=0)
    codec = SumsCodec(WireFormat.EXACT)
    sums = HostSums(links, codec, SumsCodec(WireFormat.F32), costs)
    kept = [array for slots in (sums._out, sums._in) for slot in slots for array in slot]
    token_bytes = 2 * 3 * token_exchange.SLOTS * token_exchange.MOST_BYTES
    assert among - alone == sum(array.nbytes for array in kept) + token_bytes
    # A small step does not fill it.
    few, more = (host_need(store.manifest, some, [1, 1], DEMAND).buffer_bytes for some in plans)
    assert more - few == 2 * 2 * codec.bound(DEMAND.step_tokens * store.config.model_dim)
    job = plan_job(store.config, store.manifest.group_size, "whole", node_of_rank=[0, 0, 1, 2])
    assert [plan.nodes for plan in job.plans] == [3] * 4


def two_hosts() -> World:
    """Four ranks on two hosts, from rank 0's side; without MPI, so nothing can be exchanged."""
    world = World()
    world.size, world.hosts, world.node_of_rank = 4, ("a", "a", "b", "b"), (0, 0, 1, 1)
    return world


def check(store: Store, *available_bytes: int, **changes: object) -> None:
    records: list[StartRecord] = [replace(RECORD, available_bytes=n, **changes) for n in available_bytes]
    check_memory(two_hosts(), store.manifest, plans_of(store, 4), DEMAND, records)


def test_a_host_without_room_is_named(store: Store) -> None:
    with pytest.raises(AgreedError) as caught:
        check(store, 1 << 40, 1 << 40, 1 << 40, 1000)
    assert caught.value.exit_code == 2
    (line,) = caught.value.lines
    assert line.startswith("b needs ")
    assert "for 130 positions in f16" in line
    assert "has 0.0 MB (the host's memory)" in line
    assert "lower --ctx" in line


def test_every_host_without_room_is_named_at_once(store: Store) -> None:
    with pytest.raises(AgreedError) as caught:
        check(store, 1000, 1000, 1000, 1000)
    assert [line.split()[0] for line in caught.value.lines] == ["a", "b"]


def test_weights_that_do_not_fit_are_a_warning(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    need = host_need(store.manifest, plans_of(store, 4)[2:], [RECORD.threads] * 2, DEMAND)
    with caplog.at_level(logging.WARNING, "dist_moe"):
        check(store, 1 << 40, 1 << 40, need.full_bytes, need.full_bytes)
        assert caplog.messages == []
        check(store, 1 << 40, 1 << 40, need.full_bytes - 1, need.full_bytes)
    (line,) = caplog.messages
    assert line.startswith("b needs ")
    assert "read from the disk again and again" in line


def test_a_store_in_memory_needs_no_more(store: Store) -> None:
    need = host_need(store.manifest, plans_of(store, 4)[:2], [RECORD.threads] * 2, DEMAND)
    room = need.kv_bytes + need.buffer_bytes
    check(store, *[room] * 4, medium="memory")
    with pytest.raises(AgreedError):
        check(store, *[room - 1] * 4, medium="memory")


def test_a_host_that_does_not_tell_is_let_through(store: Store) -> None:
    check(store, 0, 0, 0, 0)


# ---- what there is ----


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_hosts_memory(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    1000 kB\nHugePages_Total:       0\n"})
    found = available_memory(tmp_path / "proc", tmp_path / "cgroups")
    assert found == AvailableMemory(1000 * 1024, "the host's memory")


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path) == AvailableMemory(0, "unknown")


@pytest.mark.parametrize("limited", ["job/step", "job"])
def test_cgroup_2_with_its_parents(tmp_path: Path, limited: str) -> None:
    write(tmp_path, {"proc/meminfo": "MemAvailable: 1000000 kB\n", "proc/self/cgroup": "0::/job/step\n"})
    for name in ("job/step", "job"):
        write(
            tmp_path / "cgroups" / name,
            {
                "memory.max": "900000\n" if name == limited else "max\n",
                "memory.current": "500000\n",
                "memory.stat": "anon 1\ninactive_file 100000\nactive_file 50000\nfile 400000\n",
            },
        )
    found = available_memory(tmp_path / "proc", tmp_path / "cgroups")
    assert found == AvailableMemory(900000 - 500000 + 150000, f"cgroup /{limited}")


@pytest.mark.parametrize("place", ["job", ""])
def test_cgroup_1_also_where_only_the_root_is_seen(tmp_path: Path, place: str) -> None:
    write(
        tmp_path, {"proc/meminfo": "MemAvailable: 1000 kB\n", "proc/self/cgroup": "5:cpu:/job\n4:memory:/job\n0::/\n"}
    )
    write(
        tmp_path / "cgroups" / "memory" / place,
        {
            "memory.limit_in_bytes": "800000",
            "memory.usage_in_bytes": "900000",
            "memory.stat": "total_inactive_file 150000\ntotal_active_file 1",
        },
    )
    found = available_memory(tmp_path / "proc", tmp_path / "cgroups")
    assert found == AvailableMemory(50001, f"cgroup /{place}")


def test_cgroup_1_without_a_limit(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemAvailable: 1000 kB\n", "proc/self/cgroup": "4:memory:/\n"})
    write(tmp_path / "cgroups/memory", {"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": "9"})
    assert available_memory(tmp_path / "proc", tmp_path / "cgroups").limited_by == "the host's memory"


def test_this_machine_tells() -> None:
    assert available_memory().available_bytes > 0


def test_what_lies_in_memory(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    line = f"9 1 {os.major(device)}:{os.minor(device)} / / rw - tmpfs none rw\n"
    write(tmp_path, {"proc/self/mountinfo": line})
    assert is_in_memory(tmp_path, tmp_path / "proc")
    write(tmp_path, {"proc/self/mountinfo": line.replace("tmpfs", "ext4")})
    assert not is_in_memory(tmp_path, tmp_path / "proc")
    assert not is_in_memory(tmp_path / "nowhere")


def test_hosts_without_room_for_all_experts_keep_to_their_part(store: Store) -> None:
    """Both have every file; `auto` shares all experts where memory holds them, else each computes its own."""
    world, manifest = two_hosts(), store.manifest
    inventory = Inventory(("a", "b"), ("/s", "/s"), (frozenset(range(manifest.nodes)),) * 2)
    shared = plan_from_inventory(world, manifest, inventory, "shared")
    whole = plan_from_inventory(world, manifest, inventory, "whole")
    needs = [host_need(manifest, job.of_node(0), [1, 1], DEMAND).full_bytes for job in (shared, whole)]
    assert needs[1] < needs[0]
    for available_bytes, expected in ((needs[0], "shared"), (needs[0] - 1, "whole"), (0, "shared")):
        records = [replace(RECORD, available_bytes=available_bytes, threads=1)] * 4
        fits = partial(has_room, world, manifest, DEMAND, records)
        assert plan_from_inventory(world, manifest, inventory, "auto", fits).layout == expected
        assert plan_from_inventory(world, manifest, inventory, "shared", fits).layout == "shared"
