"""A cold start reads each rank's own weights once per host, in file order, and only what fits into memory."""

from __future__ import annotations

import errno
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_moe.engine.requests.request import Request
from dist_moe.engine.start import read_ahead
from dist_moe.engine.start.memory import Demand, host_need, layers_with_room
from dist_moe.kernels import KvFormat
from dist_moe.model.own_spans import OwnSpans, Span, dealt, joined, own_spans, pieces
from dist_moe.parallel.plan import EXPERT_LAYOUTS, Plan
from dist_moe.parallel.world import AgreedError, World
from dist_moe.store.reader import Store
from dist_moe.store.unit_parts import unit_bytes
from dist_moe.store.units import chunks_per_expert
from helpers.plans import plan_of
from helpers.start_record import RECORD
from helpers.tiny_model import TinyModel

LAYERS = 3
MAIN, PAGE_TABLES = "main", "page tables"


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer between routed ones."""
    return TinyModel(layers=LAYERS, dense_layers=(1,), heads=8).write(tmp_path_factory.mktemp("ahead"))


@pytest.fixture(params=[1, 3])
def store(request: pytest.FixtureRequest, make_store, source: Path) -> Store:
    return make_store(source, "q8", nodes=request.param)


def unit_bytes_of(store: Store, plan: Plan, routed_layers: int) -> set[int]:
    """The address of every 64th byte of the units that a rank computes with."""
    config, manifest, found = store.config, store.manifest, set()
    for layer in range(config.layers):
        experts, chunks = config.layer_experts(layer), chunks_per_expert(config, manifest.group_size, layer)
        owned = plan.owned_chunks(layer)
        wanted = {"head": plan.heads, "kv_head": plan.kv_heads}
        if layer < routed_layers or config.is_dense(layer):
            wanted["chunk"] = range(experts * chunks) if owned is None else owned
        if layer == 0:
            wanted["vocabulary"] = plan.vocabulary_blocks
        for kind, indices in wanted.items():
            count = unit_bytes(manifest, kind, layer, 0)
            for address in store.unit_addresses(kind, layer)[np.array(indices, np.int64)].tolist():
                found.update(range(address, address + count, 64))
    return found


def bytes_of(spans: object) -> list[int]:
    """Of every 64 bytes in some runs the first one's address."""
    return [byte for span in spans for byte in range(span.address, span.address + span.bytes, 64)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("routed_layers", [0, 1, LAYERS])
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_a_rank_reads_its_own_units_and_the_common_file(
    store: Store, ranks: int, layout: str, routed_layers: int
) -> None:
    first, count = store.common_span()
    for rank in range(ranks):
        plan = plan_of(store, rank, ranks, layout)
        spans = own_spans(store, plan, routed_layers)
        found = bytes_of(spans.own) + bytes_of(spans.shared)
        units = unit_bytes_of(store, plan, routed_layers)
        assert units <= set(found)
        gaps = set(found) - units - set(range(first, first + count, 64))
        assert len(gaps) < 64 * len(spans.own + spans.shared)  # alignment between tensors
        assert list(spans.own) == sorted(spans.own)


def test_runs_that_touch_are_one() -> None:
    found = joined([(50_000, 100), (10_000, 64), (10_064, 10_000), (20_100, 1), (50_050, 10)])
    assert list(found) == [Span(10_000, 10_101), Span(50_000, 100)]
    assert list(joined([])) == []


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50])
def test_parts_are_equal_and_together_the_whole(parts: int) -> None:
    spans = [Span(1000, 17), Span(2000, 1), Span(5000, 100)]
    found = [list(dealt(spans, part, parts)) for part in range(parts)]
    flat = [byte for part in found for span in part for byte in range(span.address, span.address + span.bytes)]
    assert flat == [byte for span in spans for byte in range(span.address, span.address + span.bytes)]
    sizes = [sum(span.bytes for span in part) for part in found]
    assert max(sizes) - min(sizes) <= 1


def test_pieces_are_the_same_bytes() -> None:
    assert list(pieces([Span(0, 5), Span(10, 4)], 4)) == [Span(0, 4), Span(4, 1), Span(10, 4)]


class Recorder:
    """Instead of reading: what was asked for, by thread, and as which of a host's ranks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, part: int, parts: int, *, cold: bool, error: int = 0) -> None:
        self.read: dict[str, list[Span]] = {MAIN: [], PAGE_TABLES: []}
        self.done = threading.Event()
        self._error = error
        enter = read_ahead._enter_pages
        monkeypatch.setattr(read_ahead, "is_absent", lambda *_: cold)
        monkeypatch.setattr(read_ahead, "populate", self._populate)
        monkeypatch.setattr(read_ahead, "mates_of_rank", lambda *_: (part, parts, parts * cold))
        monkeypatch.setattr(read_ahead, "_enter_pages", lambda *told: (enter(*told), self.done.set()))

    def _populate(self, address: int, count: int) -> int:
        thread = PAGE_TABLES if threading.current_thread().name == PAGE_TABLES else MAIN
        self.read[thread].append(Span(address, count))
        return self._error


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_ranks_of_a_host_read_each_byte_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, layout: str, ranks: int
) -> None:
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 1 << 14)
    everything: list[int] = []
    for rank in range(ranks):
        recorder = Recorder(monkeypatch, rank, ranks, cold=True)
        plan = plan_of(store, rank, ranks, layout)
        read_ahead._read_ahead(World(), store, plan, LAYERS, 1, None)
        assert recorder.done.wait(30)
        spans = own_spans(store, plan, LAYERS)
        assert bytes_of(recorder.read[PAGE_TABLES]) == bytes_of(pieces((*spans.shared, *spans.own), 1 << 14))
        assert recorder.read[MAIN] == sorted(recorder.read[MAIN])
        everything += bytes_of(sorted({*recorder.read[MAIN]}))
        monkeypatch.undo()
        monkeypatch.setattr(read_ahead, "PIECE_BYTES", 1 << 14)
    kv_heads = sum(len(plan_of(store, rank, ranks, layout).kv_heads) for rank in range(ranks)) - store.config.kv_heads
    kv_bytes = unit_bytes(store.manifest, "kv_head", 0, 0)
    twice = len(everything) - len(set(everything))
    assert twice <= kv_heads * store.config.layers * kv_bytes // 64 + 64 * ranks


def test_nothing_is_read_that_is_in_memory(store: Store, make_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, 0, 1, cold=False)
    make_engine(store)
    assert recorder.done.wait(30)
    assert recorder.read[MAIN] == []
    assert recorder.read[PAGE_TABLES]


def test_without_room_routed_experts_are_left_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, 0, 1, cold=True)
    plan = plan_of(store, 0, 1, "shared")
    read_ahead._read_ahead(World(), store, plan, 0, 1, None)
    assert recorder.done.wait(30)
    chunks = set(store.unit_addresses("chunk", 0).tolist())
    for thread in (MAIN, PAGE_TABLES):
        assert chunks.isdisjoint(bytes_of(recorder.read[thread]))
        assert set(store.unit_addresses("chunk", 1).tolist()) <= set(bytes_of(recorder.read[thread]))  # a dense layer


def test_a_file_that_cannot_be_read_is_named(store: Store, make_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch, 0, 1, cold=True, error=errno.EFAULT)
    with pytest.raises(
        AgreedError, match="or what follows it, cannot be read: the disk failed, or the file became shorter"
    ) as caught:
        make_engine(store)
    assert str(caught.value).startswith(str(store.directory))
    assert caught.value.exit_code == 2


def test_progress_ends_with_all_bytes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch, 0, 1, cold=True)
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 1 << 14)
    told: list[tuple[int, int]] = []
    world = World()
    read_ahead._read_ahead(
        world, store, plan_of(store, 0, 1, "whole"), LAYERS, 2, lambda *figures: told.append(figures)
    )
    done = [figures[0] for figures in told]
    assert done == sorted(done)
    assert told[-1][0] == told[-1][1] == sum(span.bytes for span in all_spans(store))
    assert world.progress.layer == len(told)  # or the watchdog takes a slow disk for a stall


def all_spans(store: Store) -> tuple[Span, ...]:
    spans: OwnSpans = own_spans(store, plan_of(store, 0, 1, "whole"), LAYERS)
    return spans.own + spans.shared


def test_copied_weights_tell_their_progress(store: Store, make_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    recorder = Recorder(monkeypatch, 0, 1, cold=True)
    bring = read_ahead.bring_in_weights
    monkeypatch.setattr(
        "dist_moe.engine.start.loading.bring_in_weights",
        lambda world, model, **how: bring(world, model, **how | {"on_reading": lambda *figures: told.append(figures)}),
    )
    engine = make_engine(store, copy_weights=True)
    assert told[-1][0] == told[-1][1] > 0
    assert recorder.read[MAIN] == []
    engine.generate([Request((1, 2, 3), 2)])


def test_a_hosts_smallest_rank_decides_how_much_has_room(store: Store) -> None:
    need = host_need(store.manifest, [plan_of(store, 0, 1, "whole")], [1], Demand(KvFormat.F16, 130, 64))
    world = World()
    world.size, world.hosts, world.node_of_rank, world.rank = 3, ("a", "a", "b"), (0, 0, 1), 1

    def layers(*available_bytes: int) -> int:
        records = [replace(RECORD, available_bytes=count) for count in available_bytes]
        return layers_with_room(world, need, records, 100)

    assert layers(need.full_bytes, need.full_bytes, 5) == 100
    assert layers(0, 0, 5) == 100  # the host does not tell
    middle_bytes = (need.full_bytes + need.least_bytes) // 2
    assert layers(need.full_bytes, need.full_bytes - 1, 1 << 40) == 79
    assert layers(middle_bytes, need.full_bytes, 0) == 40
    assert layers(need.least_bytes, need.full_bytes, 0) == 0
