"""The matrices in each unit of a store, where in it they lie, and the bytes of all together.

Units of one kind and layer have the same matrices; where their formats differ, so do their bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from dist_moe.kernels.formats import VOCABULARY_BLOCK, MatrixFormat, packed_bytes
from dist_moe.store.formats import format_label
from dist_moe.store.manifest import Manifest
from dist_moe.store.units import UnitKind, tensor_name, unit_count

UNIT_KEYS: dict[UnitKind, tuple[str, ...]] = {
    "head": ("q", "o"),
    "kv_head": ("k", "v"),
    "chunk": ("gate", "up", "down"),
    "vocabulary": ("lm_head",),
}


@dataclass(frozen=True)
class UnitPart:
    """One packed matrix [rows, columns] of a unit."""

    key: str
    rows: int
    columns: int
    format: MatrixFormat
    bytes: slice  # of the unit


def unit_parts(manifest: Manifest, kind: UnitKind, layer: int, index: int) -> tuple[UnitPart, ...]:
    """The matrices of one unit in their order."""
    expert = _expert(manifest, kind, layer, index)
    keys = UNIT_KEYS[kind]
    shapes = [_shape(manifest, kind, key, layer) for key in keys]
    formats = [manifest.matrix_format(key, layer, expert) for key in keys]
    sizes = [packed_bytes(own.format, *shape, own.group) for own, shape in zip(formats, shapes, strict=True)]
    stops = list(accumulate(sizes))
    return tuple(
        UnitPart(key, *shape, own, slice(stop - size, stop))
        for key, shape, own, size, stop in zip(keys, shapes, formats, sizes, stops, strict=True)
    )


def unit_bytes(manifest: Manifest, kind: UnitKind, layer: int, index: int) -> int:
    """Bytes of one unit, a multiple of 64; `layer` is ignored for the vocabulary."""
    size: int = unit_parts(manifest, kind, layer, index)[-1].bytes.stop
    return size


def unit_sizes(manifest: Manifest, kind: UnitKind, layer: int) -> npt.NDArray[np.int64]:
    """Bytes of every unit of one kind in one layer, int64 [units of the whole model]."""
    count = unit_count(manifest.config, manifest.group_size, kind, layer)
    if kind != "chunk" or manifest.formats.uniform_format is not None:
        return np.full(count, unit_bytes(manifest, kind, layer, 0))
    chunks, known = manifest.layer_chunks_per_expert(layer), dict[tuple[MatrixFormat, ...], int]()
    sizes = []
    for expert in range(manifest.config.layer_experts(layer)):
        formats = tuple(manifest.formats.matrix(key, layer, expert) for key in ("gate", "down"))
        if formats not in known:
            known[formats] = unit_bytes(manifest, kind, layer, expert * chunks)
        sizes.append(known[formats])
    return np.repeat(np.array(sizes, np.int64), chunks)


def units_bytes(manifest: Manifest, kind: UnitKind, layer: int, indices: Iterable[int]) -> int:
    """Bytes of some units together."""
    return int(unit_sizes(manifest, kind, layer)[np.fromiter(indices, np.int64)].sum())


def unit_tensor_name(manifest: Manifest, kind: UnitKind, layer: int, index: int) -> str:
    """The tensor of a shard that holds a unit: in a store of several formats its name ends in those of the unit."""
    name = tensor_name(kind, layer)
    if manifest.formats.uniform_format is not None:
        return name
    expert = _expert(manifest, kind, layer, index)
    labels = [format_label(manifest.matrix_format(key, layer, expert)) for key in UNIT_KEYS[kind]]
    return f"{name}.{'-'.join(dict.fromkeys(labels))}"


def _expert(manifest: Manifest, kind: UnitKind, layer: int, index: int) -> int:
    return index // manifest.layer_chunks_per_expert(layer) if kind == "chunk" else 0


def _shape(manifest: Manifest, kind: UnitKind, key: str, layer: int) -> tuple[int, int]:
    """Rows and columns of a matrix of a unit."""
    config = manifest.config
    widths = {"head": config.head_dim, "kv_head": config.head_dim, "vocabulary": VOCABULARY_BLOCK}
    width = manifest.layer_chunk_width(layer) if kind == "chunk" else widths[kind]
    return (config.model_dim, width) if key in ("o", "down") else (width, config.model_dim)
