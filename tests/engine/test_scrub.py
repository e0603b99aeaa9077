"""--scrub: every mapped unit is checked by someone, a flipped byte is found, and steps are left alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.engine.requests.request import Request
from dist_moe.engine.runtime import EngineOptions, Runtime
from dist_moe.engine.watch.scrub import PIECE_BYTES, Scrubber, own_copies, own_units
from dist_moe.kernels import WeightFormat, address_of
from dist_moe.parallel.plan import EXPERT_LAYOUTS
from dist_moe.parallel.world import AgreedError, World
from dist_moe.store.checksum import checksum_text
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from dist_moe.store.sealed import Sealed
from helpers.plans import plan_of
from helpers.tiny_model import TinyModel

LONG_S = 30.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A small store on two shards, to be damaged."""
    directory = tmp_path / "store"
    source = Checkpoint.open(TinyModel(bias=True).write(tmp_path / "tiny"))
    convert(source, directory, StoreOptions(format=WeightFormat.Q8, nodes=2), lambda *told: None)
    return Store.open(directory)


@pytest.fixture
def scrubber(store: Store) -> Iterator[Scrubber]:
    """Over the whole store, not yet started."""
    made = Scrubber(lambda: own_units(store, plan_of(store, 0, 1, "whole"), 0, 1))
    yield made
    made.close()


def flip(sealed: Sealed, byte: int) -> None:
    """Change a byte of the file below the mapping."""
    whole = sealed.path.read_bytes()
    at = whole.index(sealed.data.tobytes()) + byte
    with sealed.path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([whole[at] ^ 0x80]))


def wait_for(condition: object) -> None:
    deadline_s = time.monotonic() + LONG_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def made_up(*lengths: int) -> list[Sealed]:
    """Units of random bytes with their checksums."""
    units = []
    for i, length in enumerate(lengths):
        data = np.random.default_rng(i).integers(0, 256, length, np.uint8)
        units.append(Sealed(Path("file"), "tensor", f"unit {i}", data, int(checksum_text(data), 16)))
    return units


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_all_ranks_together_check_every_unit(store: Store, ranks: int, layout: str) -> None:
    config = store.config
    expected = {(sealed.tensor, sealed.unit) for sealed in store.sealed_common()}
    for layer in range(config.layers):
        for kind in ("head", "kv_head", "chunk"):
            for index in store.present_units(kind, layer):
                sealed = store.sealed_unit(kind, layer, int(index))
                expected.add((sealed.tensor, sealed.unit))
    expected |= {("vocabulary", f"vocabulary block {block}") for block in store.present_units("vocabulary", 0)}
    found: list[tuple[str, str]] = []
    for rank in range(ranks):
        units = own_units(store, plan_of(store, rank, ranks, layout), rank, ranks)
        found += [(sealed.tensor, sealed.unit) for sealed in units]
    assert set(found) == expected
    repeated = {place for place in found if found.count(place) > 1}
    assert all("KV head" in unit for _, unit in repeated)  # a group's ranks share it


def test_an_intact_store_passes(scrubber: Scrubber) -> None:
    scrubber.finish_pass()
    assert (scrubber.passes, scrubber.damage) == (1, None)


@pytest.mark.parametrize("which", [0, 7, -1])
def test_a_flipped_byte_is_named(store: Store, scrubber: Scrubber, which: int) -> None:
    sealed = list(own_units(store, plan_of(store, 0, 1, "whole"), 0, 1))[which]
    flip(sealed, len(sealed.data) - 1)
    scrubber.finish_pass()
    text = str(scrubber.damage)
    assert text.startswith(f"{sealed.path}: tensor '{sealed.tensor}'{', ' if sealed.unit else ''}{sealed.unit} is dam")
    assert not scrubber.check_piece()


def test_long_units_are_checked_in_pieces() -> None:
    lengths = (1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 5)
    scrubber = Scrubber(lambda: made_up(*lengths))
    pieces = 0
    while scrubber.passes == 0:
        assert scrubber.check_piece()
        pieces += 1
    assert pieces == 1 + 1 + 1 + 2 + 4 + 1  # the last one begins the next pass
    assert scrubber.damage is None


def test_idle_time_is_used_and_the_damage_found(store: Store, scrubber: Scrubber) -> None:
    scrubber.start()
    wait_for(lambda: scrubber.passes > 0)
    flip(store.sealed_unit("head", 1, 2), 0)
    wait_for(lambda: scrubber.damage is not None)
    assert "layer 1, query head 2" in str(scrubber.damage)


def test_nothing_is_read_inside_a_step() -> None:
    reads = threading.Event()
    scrubber = Scrubber(lambda: reads.set() or made_up(10))  # type: ignore[func-returns-value]
    scrubber.pause()
    scrubber.start()
    assert not reads.wait(0.5)
    scrubber.resume()
    assert reads.wait(LONG_S)
    scrubber.close()


def test_a_flip_in_idle_time_ends_the_next_request_before_it_is_answered(store: Store) -> None:
    engine = Runtime(store, World(), EngineOptions(context=64, scrub=True))
    engine.generate([Request((1, 2, 3), 3)])
    flip(store.sealed_unit("vocabulary", 0, 1), 5)
    scrubber = engine._scrubber
    assert scrubber is not None
    wait_for(lambda: scrubber.damage is not None)
    tokens: list[int] = []
    with pytest.raises(AgreedError, match="vocabulary block 1 is damaged"):
        engine.generate([Request((1, 2, 3), 3)], lambda _, token: tokens.append(token))
    assert tokens == []
    engine.stop()
    engine.kernels.close()


def test_the_engine_finishes_what_no_idle_time_was_found_for(store: Store) -> None:
    engine = Runtime(store, World(), EngineOptions(context=64, scrub=True))
    engine.generate([Request((1, 2, 3), 3)])
    engine.finish_scrub()
    assert engine._scrubber is not None
    assert engine._scrubber.passes > 0
    flip(store.sealed_unit("chunk", 0, 3), 5)
    engine._scrubber.passes = 0
    with pytest.raises(AgreedError, match="layer 0, expert 1, chunk 1 is damaged"):
        engine.finish_scrub()
    engine.stop()
    engine.kernels.close()


def copied(store: Store, layout: str) -> Runtime:
    return Runtime(store, World(), EngineOptions(context=64, experts=layout, copy_weights=True, scrub=True))


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_of_copied_weights_the_copies_are_checked(store: Store, layout: str) -> None:
    engine = copied(store, layout)
    copy, plan = engine.model.weights.copy, plan_of(store, 0, 1, layout)
    assert copy is not None
    units, mapped = list(own_copies(store, copy, 0, 1)), list(own_units(store, plan, 0, 1))
    assert {(unit.tensor, unit.unit) for unit in units} == {(unit.tensor, unit.unit) for unit in mapped}
    assert len(units) == len(mapped)
    used = {int(address) for layer in engine.model.weights.layers for address in layer.experts.addresses}
    assert used <= {address_of(unit.data) for unit in units}
    assert all(unit.copied == (bool(unit.unit) or unit.tensor.endswith("router")) for unit in units)
    engine.stop()
    engine.kernels.close()


def test_a_flipped_bit_of_a_copy_is_found_and_the_file_not_blamed(store: Store) -> None:
    engine = copied(store, "whole")
    copy = engine.model.weights.copy
    assert copy is not None
    engine.finish_scrub()
    unit = next(unit for unit in copy.sealed() if unit.unit == "layer 0, expert 1, chunk 1")
    unit.data[7] ^= 0x10
    assert engine._scrubber is not None
    engine._scrubber.passes = 0
    with pytest.raises(AgreedError, match=r"^this rank's copy of .*layer 0, expert 1, chunk 1 is damaged.*memory"):
        engine.finish_scrub()
    engine.stop()
    engine.kernels.close()
