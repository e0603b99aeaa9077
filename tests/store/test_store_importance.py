"""Importance of columns on its way from the options into the scales of every matrix and into the manifest."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.errors import StoreError, UsageError
from dist_moe.kernels import Kernels, PackMatrix, ScaleChoice, WeightFormat, aligned_empty, packed_bytes, reference
from dist_moe.store.decoded import DecodedStore
from dist_moe.store.manifest import parse_manifest, read_manifest
from dist_moe.store.matrices import matrix_place
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from dist_moe.store.recut import recut
from helpers.tiny_store import contents, ignore, run_convert

SEARCHED = {"format": WeightFormat.Q4, "scales": ScaleChoice.MSE}


@dataclass(frozen=True)
class Drawn:
    """Random importance of every matrix but those of expert 1."""

    checkpoint: Checkpoint
    fingerprint: str = "drawn"
    factor: float = 1.0
    extra: int = 0

    def importance_C(self, name: str) -> npt.NDArray[np.float32] | None:
        if "experts.1." in name:
            return None
        columns = self.checkpoint.shape(name)[1] + self.extra
        drawn = np.random.default_rng(zlib.crc32(name.encode())).uniform(0, 1, columns) ** 4
        return (drawn * self.factor).astype(np.float32)


@pytest.mark.parametrize("group_size", [32, 0])
def test_every_matrix_is_packed_with_its_own(
    checkpoint: Checkpoint, make_store: Callable[..., Path], group_size: int
) -> None:
    importance = Drawn(checkpoint)
    with Kernels(1) as kernels:
        store = Store.open(make_store(**SEARCHED, group_size=group_size, importance=importance, nodes=2))
        decoded = DecodedStore(store, kernels)
        names = [name for name in checkpoint.names() if matrix_place(store.config, group_size, name)]
        assert {name.rsplit(".", 1)[-1] for name in names} >= {"q", "k", "v", "o", "gate", "up", "down"}
        for name in names:
            weights_RC, key = checkpoint.read(name), name.rsplit(".", 1)[-1]
            group = store.manifest.matrix_format(key, 0).group
            values_RC = decoded.whole(name)
            for other in (importance.importance_C(name), None):
                packed = aligned_empty(packed_bytes(WeightFormat.Q4, *weights_RC.shape, group), np.uint8)
                matrix = PackMatrix(packed, weights_RC, *weights_RC.shape, group, None, other)
                kernels.pack_matrices([matrix], WeightFormat.Q4, ScaleChoice.MSE)
                expected_RC = reference.unpack_matrix(packed, *weights_RC.shape, WeightFormat.Q4, group)
                assert np.array_equal(values_RC, expected_RC) == (other is not None or "experts.1." in name), name


def test_the_manifest_keeps_its_fingerprint(
    checkpoint: Checkpoint, make_store: Callable[..., Path], tmp_path: Path
) -> None:
    there = make_store("one", **SEARCHED, importance=Drawn(checkpoint))
    manifest = read_manifest(there / "manifest.json")
    assert manifest.importance == "drawn"
    assert parse_manifest(manifest.render(), "again").importance == "drawn"
    with pytest.raises(StoreError, match="importance drawn, not none"):
        run_convert(checkpoint, there, **SEARCHED)
    two = make_store("two", **SEARCHED, importance=Drawn(checkpoint), nodes=2)
    recut(Store.open(there), tmp_path / "cut", StoreOptions(nodes=2), ignore)
    assert contents(tmp_path / "cut") == contents(two)


def test_what_cannot_weight_anything_is_refused(checkpoint: Checkpoint, make_store: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="is of 37 columns, not of 36"):
        make_store("wide", **SEARCHED, importance=Drawn(checkpoint, extra=1))
    with pytest.raises(UsageError, match="NaN, infinite or below 0"):
        make_store("negative", **SEARCHED, importance=Drawn(checkpoint, factor=-1.0))
    with pytest.raises(UsageError, match="--importance weights the search"):
        make_store("absmax", format=WeightFormat.Q8, scales=ScaleChoice.ABSMAX, importance=Drawn(checkpoint))
