"""A store cut into other shards without its source: the same units, each checked on its way into the new files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from dist_moe.errors import StoreError, UsageError
from dist_moe.store.checksum import RunningChecksum
from dist_moe.store.convert import Conversion, Origin, Progress, write_plan
from dist_moe.store.layout import TensorSpec, weight_files
from dist_moe.store.manifest import Manifest
from dist_moe.store.matrices import matrix_place
from dist_moe.store.pack import Packed
from dist_moe.store.placement import indices_of
from dist_moe.store.plan import StoreOptions, cut
from dist_moe.store.reader import Store
from dist_moe.store.team import Team
from dist_moe.store.units import UNIT_KINDS, UnitKind, unit_count
from dist_moe.store.verify import check_sealed

_PIECE_BYTES = 32 << 20

_Unit = tuple[UnitKind, int, int]  # kind, layer (0 for the vocabulary), index


def recut(
    store: Store, destination: Path, options: StoreOptions, progress: Progress, team: Team | None = None
) -> Conversion:
    """Make a store of another store's units, or finish an interrupted one; byte for byte as if made from the source.

    Only how many weights of a tensor were not finite may be listed with another file of the new store.

    Args:
        store: What is cut anew; all its shards must be here.
        destination: The directory of the new store; created if need be.
        options: `nodes`, `experts` or `placement`, and `force`; the weights' formats stay as they are.
        progress: Told about every piece that is written.
        team: The ranks that share the files, on their leader; None: this process alone.

    Raises:
        UsageError: The model cannot be cut like that, or the destination is the store itself.
        PlaceError: The destination holds something else, is locked, or cannot be written.
        StoreError: A shard is not here, a unit is damaged, or the destination holds another store.
    """
    if destination.resolve() == store.directory.resolve():
        raise UsageError(f"{destination}: is the store that is read; name another directory with -o")
    plan = cut(store.manifest, options)
    _require_all(store)
    return write_plan(plan, _text_files(store), origin_of(store), destination, options, progress, team)


def origin_of(store: Store) -> Origin:
    """A store whose units become another one."""
    return Origin(store.directory, lambda *_: StorePacker(store))


def require_same_weights(store: Store, plan: Manifest) -> None:
    """Make sure that a store holds the weights that a plan was made of; StoreError if not."""
    own = store.manifest
    same = (own.source_fingerprint, own.formats, own.scales, own.importance) == (
        plan.source_fingerprint,
        plan.formats,
        plan.scales,
        plan.importance,
    )
    if not same:
        raise StoreError(f"{store.directory}: is another store than rank 0 reads; give all hosts the same files")
    _require_all(store)


class StorePacker:
    """Takes the units of one store (`UnitPacker`), each compared with its checksum."""

    def __init__(self, store: Store) -> None:
        """Take the store; its files are mapped, not read."""
        self._store = store
        self._commons = {sealed.tensor: sealed for sealed in store.sealed_common()}
        self._counts = _nonfinite_units(store.manifest)
        self.nonfinite = Counter[str]()

    def units(self, kind: UnitKind, layer: int, indices: Sequence[int], counted: Sequence[bool]) -> Iterator[Packed]:
        """The packed units in order, uint8 [unit bytes] each, as read-only views; StoreError if one is damaged."""
        for index, counts in zip(indices, counted, strict=True):
            sealed = self._store.sealed_unit(kind, layer, index)
            check_sealed(sealed)
            if counts:
                self.nonfinite.update(self._counts.get((kind, layer, index), {}))
            yield sealed.data

    def common(self, spec: TensorSpec) -> Iterator[npt.NDArray[Any]]:
        """One tensor of the common file in pieces; StoreError behind the last one if it is damaged."""
        sealed, running = self._commons[spec.name], RunningChecksum()
        for first in range(0, len(sealed.data), _PIECE_BYTES):
            piece = sealed.data[first : first + _PIECE_BYTES]
            running.update(piece)
            yield piece
        check_sealed(sealed, running)
        entry = self._store.manifest.files[0]
        self.nonfinite.update({name: count for name, count in entry.nonfinite.items() if name == spec.name})


def _require_all(store: Store) -> None:
    """Raise StoreError unless every unit is on this machine."""
    config, group_size = store.config, store.manifest.group_size
    for layer in range(config.layers):
        for kind in UNIT_KINDS:
            store.require(kind, layer, range(unit_count(config, group_size, kind, layer)))


def _text_files(store: Store) -> dict[str, bytes]:
    """The small files, as opening the store has checked them."""
    weights = weight_files(store.manifest)
    names = [entry.name for entry in store.manifest.files if entry.name not in weights]
    return {name: (store.directory / name).read_bytes() for name in names}


def _nonfinite_units(manifest: Manifest) -> Mapping[_Unit, Mapping[str, int]]:
    """Where the weights that were not finite are counted: with the first unit of their tensor in each file."""
    counts: dict[_Unit, Counter[str]] = {}
    for shard, entry in enumerate(manifest.files[1 : 1 + manifest.nodes]):
        for name, count in entry.nonfinite.items():
            place = matrix_place(manifest.config, manifest.group_size, name)
            assert place is not None, name
            held = indices_of(manifest.shards[shard].runs(place.kind, place.layer)).tolist()
            unit = next(index for index in held if index in place.units)
            counts.setdefault((place.kind, place.layer, unit), Counter())[name] += count
    return counts
