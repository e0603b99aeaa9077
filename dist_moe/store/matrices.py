"""Where the source's matrices lie in a store's units, and their values as the kernels take them.

D model dim, P head dim, F hidden units of one expert, w chunk width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import Kernels
from dist_moe.kernels.formats import TILE_ROWS, MatrixFormat
from dist_moe.model_config import ModelConfig
from dist_moe.store.manifest import Manifest
from dist_moe.store.unit_parts import unit_parts
from dist_moe.store.units import UnitKind, chunks_per_expert, unit_count

_ALL = slice(None)
_IN_LAYER = re.compile(r"layers\.(\d+)\.(?:experts\.(\d+)\.)?(q|k|v|o|gate|up|down)")
_KINDS: dict[str, UnitKind] = {"q": "head", "o": "head", "k": "kv_head", "v": "kv_head"}


@dataclass(frozen=True)
class MatrixPlace:
    """One of the packed matrices: `key` is "q", "k", "v", "o", "gate", "up", "down" or "lm_head"."""

    key: str
    kind: UnitKind
    layer: int
    units: range  # together they hold the matrix
    expert: int = 0


@dataclass(frozen=True)
class MatrixPiece:
    """What one unit holds of a matrix: the packed [height, width] begins with its values [rows, columns]."""

    unit: int
    packed: slice  # bytes of the unit
    rows: slice  # of the matrix
    columns: slice
    height: int
    width: int
    format: MatrixFormat


def matrix_place(config: ModelConfig, group_size: int, name: str) -> MatrixPlace | None:
    """Where a logical matrix such as "layers.0.q" stands; None for a tensor of the common file."""
    if name == "lm_head":
        return MatrixPlace(name, "vocabulary", 0, range(unit_count(config, group_size, "vocabulary", 0)))
    found = _IN_LAYER.fullmatch(name)
    if found is None:
        return None
    layer, expert, key = int(found[1]), int(found[2] or 0), found[3]
    if key in _KINDS:
        return MatrixPlace(key, _KINDS[key], layer, range(unit_count(config, group_size, _KINDS[key], layer)))
    count = chunks_per_expert(config, group_size, layer)
    return MatrixPlace(key, "chunk", layer, range(expert * count, (expert + 1) * count), expert)


def matrix_pieces(manifest: Manifest, place: MatrixPlace) -> Iterator[MatrixPiece]:
    """The matrix, unit by unit in ascending order."""
    limits = {"vocabulary": manifest.config.vocabulary, "chunk": manifest.config.layer_hidden(place.layer)}
    parts = unit_parts(manifest, place.kind, place.layer, place.units.start)
    part = next(part for part in parts if part.key == place.key)
    sideways = place.key in ("o", "down")
    step = part.columns if sideways else part.rows
    for position, unit in enumerate(place.units):
        span = slice(position * step, min((position + 1) * step, limits.get(place.kind, step * len(place.units))))
        rows, columns = (_ALL, span) if sideways else (span, _ALL)
        yield MatrixPiece(unit, part.bytes, rows, columns, part.rows, part.columns, part.format)


def piece_values(kernels: Kernels, unit: npt.NDArray[np.uint8], piece: MatrixPiece) -> npt.NDArray[np.float32]:
    """The values [height, width] of a piece with its padding, float32, from the bytes of its unit."""
    packed_RC = np.empty((piece.height, piece.width), np.float32)
    kernels.unpack(packed_RC, unit[piece.packed], piece.format.format, piece.format.group)
    return packed_RC


def piece_scales(unit: npt.NDArray[np.uint8], piece: MatrixPiece) -> npt.NDArray[np.float16]:
    """The scales [height, groups] of a q8 or q4 piece: tile by tile [groups][16], before the integers."""
    group = piece.format.group
    groups = -(-piece.width // group) if group else 1
    tile_tb = unit[piece.packed].reshape(-(-piece.height // TILE_ROWS), -1)
    scale_tjr = np.ascontiguousarray(tile_tb[:, : groups * TILE_ROWS * 2]).view(np.float16)
    return scale_tjr.reshape(-1, groups, TILE_ROWS).swapaxes(1, 2).reshape(-1, groups)[: piece.height]
