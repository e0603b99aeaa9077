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
from dist_moe.kernels.formats import TILE_ROWS, VOCABULARY_BLOCK, WeightFormat, packed_bytes
from dist_moe.model_config import ModelConfig
from dist_moe.store.manifest import Manifest
from dist_moe.store.units import (
    UnitKind,
    chunks_per_expert,
    head_row_bytes,
    layer_chunk_width,
    output_group,
    unit_count,
)

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


@dataclass(frozen=True)
class MatrixPiece:
    """What one unit holds of a matrix: the packed [height, width] begins with its values [rows, columns]."""

    unit: int
    packed: slice  # bytes of the unit
    rows: slice  # of the matrix
    columns: slice
    height: int
    width: int
    group: int


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
    return MatrixPlace(key, "chunk", layer, range(expert * count, (expert + 1) * count))


def matrix_pieces(manifest: Manifest, place: MatrixPlace) -> Iterator[MatrixPiece]:
    """The matrix, unit by unit in ascending order."""
    config, group, fmt = manifest.config, manifest.group_size, manifest.format
    dim, head_dim, key = config.model_dim, config.head_dim, place.key
    for position, unit in enumerate(place.units):
        if place.kind == "vocabulary":
            step, limit, part = VOCABULARY_BLOCK, config.vocabulary, 0
        elif place.kind == "chunk":
            step, limit = layer_chunk_width(config, group, place.layer), config.layer_hidden(place.layer)
            part = ("gate", "up", "down").index(key) * packed_bytes(fmt, step, dim, group)
        else:
            step, limit = head_dim, head_dim * len(place.units)
            part = head_row_bytes(config, fmt, group) if key in "ov" else 0
        span = slice(position * step, min((position + 1) * step, limit))
        sideways = key in ("o", "down")
        height, width = (dim, step) if sideways else (step, dim)
        own_group = output_group(config, group) if key == "o" else group
        end = part + packed_bytes(fmt, height, width, own_group)
        rows, columns = (_ALL, span) if sideways else (span, _ALL)
        yield MatrixPiece(unit, slice(part, end), rows, columns, height, width, own_group)


def piece_values(
    kernels: Kernels, unit: npt.NDArray[np.uint8], piece: MatrixPiece, fmt: WeightFormat
) -> npt.NDArray[np.float32]:
    """The values [height, width] of a piece with its padding, float32, from the bytes of its unit."""
    packed_RC = np.empty((piece.height, piece.width), np.float32)
    kernels.unpack(packed_RC, unit[piece.packed], fmt, piece.group)
    return packed_RC


def piece_scales(unit: npt.NDArray[np.uint8], piece: MatrixPiece) -> npt.NDArray[np.float16]:
    """The scales [height, groups] of a q8 or q4 piece: tile by tile [groups][16], before the integers."""
    groups = -(-piece.width // piece.group) if piece.group else 1
    tile_tb = unit[piece.packed].reshape(-(-piece.height // TILE_ROWS), -1)
    scale_tjr = np.ascontiguousarray(tile_tb[:, : groups * TILE_ROWS * 2]).view(np.float16)
    return scale_tjr.reshape(-1, groups, TILE_ROWS).swapaxes(1, 2).reshape(-1, groups)[: piece.height]
