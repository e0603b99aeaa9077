"""Units with their checksums, and the names that a SIGBUS would give them."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.kernels import WeightFormat, address_of, describe_address
from dist_moe.store.checksum import checksum_text
from dist_moe.store.reader import Store
from dist_moe.store.units import UNIT_KINDS
from helpers.tiny_store import ODD, run_convert


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three shards of a model of awkward sizes."""
    source = Checkpoint.open(ODD.write(tmp_path / "tiny"))
    run_convert(source, tmp_path / "store", format=WeightFormat.Q4, nodes=3)
    return Store.open(tmp_path / "store")


def test_every_unit_has_its_checksum_and_its_name(store: Store) -> None:
    for kind in UNIT_KINDS:
        for layer in range(store.config.layers if kind != "vocabulary" else 1):
            for index in store.present_units(kind, layer).tolist():
                sealed = store.sealed_unit(kind, layer, index)
                assert sealed.data.tobytes() == store.unit(kind, layer, index).tobytes()
                assert int(checksum_text(sealed.data), 16) == sealed.checksum
                for byte in (0, len(sealed.data) - 1):
                    assert describe_address(address_of(sealed.data) + byte) == f"{sealed.path}: {sealed.unit}"


def test_common_tensors_too(store: Store) -> None:
    found = store.sealed_common()
    assert {"embedding", "final_norm", "layers.0.router", "layers.2.o_bias"} <= {sealed.tensor for sealed in found}
    for sealed in found:
        assert int(checksum_text(sealed.data), 16) == sealed.checksum
        assert describe_address(address_of(sealed.data)) == f"{sealed.path}: tensor '{sealed.tensor}'"


def test_the_damage_is_described_as_verify_does(store: Store) -> None:
    sealed = store.sealed_unit("chunk", 0, 4)
    text = sealed.damage(0xABC)
    assert text == (
        f"{sealed.path}: tensor 'layers.0.chunks', {sealed.unit} is damaged: its bytes have checksum 0000000000000abc, "
        f"the file says {sealed.checksum:016x}"
    )


def test_a_mapping_is_known_as_long_as_a_view_needs_it(store: Store, tmp_path: Path) -> None:
    opened = Store.open(tmp_path / "store")
    view: np.ndarray | None = opened.unit("head", 1, 3)
    assert view is not None
    address = address_of(view)
    del opened
    gc.collect()
    place = describe_address(address)
    assert place is not None
    assert place.endswith("layer 1, query head 3")
    del view
    gc.collect()
    assert describe_address(address) is None
