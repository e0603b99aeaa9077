"""Which units of two stores of one model differ, byte by byte, however the stores are cut into shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from dist_moe.errors import UsageError
from dist_moe.store.decoded import tensor_places
from dist_moe.store.formats import format_label
from dist_moe.store.layout import weight_files
from dist_moe.store.manifest import Manifest
from dist_moe.store.model_json import model_to_json
from dist_moe.store.reader import Store
from dist_moe.store.units import UnitKind, describe_unit, unit_count

_LAYER_KINDS: tuple[UnitKind, ...] = ("head", "kv_head", "chunk")


@dataclass(frozen=True)
class KindDifference:
    """Units of one kind in one layer; `layer` is None outside the layers.

    Attributes:
        kind: "head", "kv_head", "chunk", "vocabulary", "common" (tensors) or "file" (small files).
        layer: Which.
        total: Units of the model.
        absent: Of those, on this machine in not both stores.
        differing: Of the others, those whose bytes differ, in words.
    """

    kind: str
    layer: int | None
    total: int
    absent: int = 0
    differing: tuple[str, ...] = ()


@dataclass(frozen=True)
class FormatDifference:
    """A matrix, by its logical name, that two stores keep in formats with these labels."""

    matrix: str
    first: str
    second: str


@dataclass(frozen=True)
class StoreDifference:
    """The whole comparison.

    Attributes:
        facts: What the two were made with, where that differs: name to (first, second).
        cut: The same for how they are cut, which changes no unit.
        kinds: In the order of the forward pass.
        matrices: Of the model, packed ones.
        formats: Those that are packed in other formats.
    """

    facts: dict[str, tuple[object, object]]
    cut: dict[str, tuple[object, object]]
    kinds: list[KindDifference] = field(default_factory=list)
    matrices: int = 0
    formats: tuple[FormatDifference, ...] = ()

    @property
    def differing(self) -> int:
        """Units, tensors and files that differ."""
        return sum(len(kind.differing) for kind in self.kinds)

    @property
    def absent(self) -> int:
        """Those that could not be compared."""
        return sum(kind.absent for kind in self.kinds)

    @property
    def equal(self) -> bool:
        """Whether everything that is here agrees."""
        return not self.differing


def unit_total(manifest: Manifest) -> int:
    """How many units a store of this model has."""
    counts = (unit_count(manifest.config, manifest.group_size, kind, layer) for kind, layer in _places(manifest))
    return sum(counts)


def compare_stores(first: Store, second: Store, progress: Callable[[int], object]) -> StoreDifference:
    """Compare all units, the common tensors and the small files of two stores.

    Args:
        first: A store, of which not all shards need be here.
        second: Another one of the same model, in whatever format and cut.
        progress: Called with every number of units compared.

    Raises:
        UsageError: They are of models with other tensors.
    """
    one, two = first.manifest, second.manifest
    if tensor_places(one.config) != tensor_places(two.config):
        raise UsageError(
            f"{second.directory}: is a store of another model ({two.source_name}) than {first.directory} "
            f"({one.source_name}); give two stores of one model"
        )
    kinds = [_common(first, second)]
    for kind, layer in _places(one):
        kinds.append(_units(first, second, kind, layer))
        progress(kinds[-1].total)
    names = ("nodes", "experts", "node_weights")
    cut = {name: (getattr(one, name), getattr(two, name)) for name in names}
    formats = list(_formats(one, two))
    return StoreDifference(
        _unequal(_facts(one, two)),
        _unequal(cut),
        [*kinds, _files(first, second)],
        len(formats),
        tuple(found for found in formats if found.first != found.second),
    )


def _places(manifest: Manifest) -> list[tuple[UnitKind, int]]:
    layers = ([(kind, layer) for kind in _LAYER_KINDS] for layer in range(manifest.config.layers))
    return [*chain.from_iterable(layers), ("vocabulary", 0)]


def _facts(one: Manifest, two: Manifest) -> dict[str, tuple[object, object]]:
    ours, theirs = model_to_json(one.config), model_to_json(two.config)
    return {
        **{name: (ours.get(name), theirs.get(name)) for name in {**ours, **theirs}},
        "source": (one.source_name, two.source_name),
        "source_fingerprint": (one.source_fingerprint, two.source_fingerprint),
        "weights": (one.label, two.label),
        "group_size": (one.group_size, two.group_size),
        "router": (one.router_format.label, two.router_format.label),
        "embedding": (one.embedding_format.label, two.embedding_format.label),
    }


def _formats(one: Manifest, two: Manifest) -> Iterator[FormatDifference]:
    """Those of all matrices, as they are packed."""
    for name, place in one.formats.named_places():
        yield FormatDifference(name, *(format_label(store.matrix_format(*place)) for store in (one, two)))


def _unequal(pairs: dict[str, tuple[object, object]]) -> dict[str, tuple[object, object]]:
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _units(first: Store, second: Store, kind: UnitKind, layer: int) -> KindDifference:
    manifest = first.manifest
    where = None if kind == "vocabulary" else layer
    totals = [unit_count(store.config, store.manifest.group_size, kind, layer) for store in (first, second)]
    if totals[0] != totals[1]:  # chunks of another width
        return KindDifference(kind, where, totals[0], 0, (f"{totals[0]} units, not {totals[1]}",))
    here = np.intersect1d(first.present_units(kind, layer), second.present_units(kind, layer)).tolist()
    differing = [
        describe_unit(manifest.config, manifest.group_size, kind, layer, index)
        for index in here
        if not np.array_equal(first.unit(kind, layer, index), second.unit(kind, layer, index))
    ]
    return KindDifference(kind, where, totals[0], totals[0] - len(here), tuple(differing))


def _common(first: Store, second: Store) -> KindDifference:
    ours, theirs = ({sealed.tensor: sealed.data for sealed in store.sealed_common()} for store in (first, second))
    differing = [name for name, data in ours.items() if not np.array_equal(data, theirs[name])]
    return KindDifference("common", None, len(ours), 0, tuple(differing))


def _files(first: Store, second: Store) -> KindDifference:
    """The small files, by the checksums with which they were opened."""

    def checksums(store: Store) -> dict[str, str]:
        weights = weight_files(store.manifest)
        return {entry.name: entry.checksum for entry in store.manifest.files if entry.name not in weights}

    ours, theirs = checksums(first), checksums(second)
    names = list(dict.fromkeys([*ours, *theirs]))
    differing = tuple(name for name in names if ours.get(name) != theirs.get(name))
    return KindDifference("file", None, len(names), 0, differing)
