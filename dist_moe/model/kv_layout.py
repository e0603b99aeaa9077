"""K and V of a cache's blocks as plain rows, one per position: the same for every machine and rank count.

Source of the blocks' layout: csrc/formats.h. A row holds K's numbers, K's scales if there are any, then V's likewise.
B bytes of a row · g KV heads · P head dim
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import BLOCK_POSITIONS, GROUP, KvFormat, kv_block_bytes

U8 = npt.NDArray[np.uint8]

_TILES = 4  # of 16 positions
_TILE = BLOCK_POSITIONS // _TILES
_KEY_GROUP_BYTES = GROUP * _TILE + 4 * _TILE  # eight vectors of [16][4] int8, then 16 float scales


def row_bytes(kv_format: KvFormat, head_dim: int) -> int:
    """B: bytes of K and V of one position of one KV head."""
    return kv_block_bytes(kv_format, head_dim) // BLOCK_POSITIONS


def read_rows(block_g: U8, kv_format: KvFormat, head_dim: int) -> U8:
    """The rows of one layer's part of a block.

    Args:
        block_g: uint8 [g, bytes of a KV head's block].
        kv_format: How the cache keeps numbers.
        head_dim: P.

    Returns:
        uint8 [64, g, B], a copy.
    """
    rows = np.empty((BLOCK_POSITIONS, len(block_g), row_bytes(kv_format, head_dim)), np.uint8)
    for part, place in _parts(block_g, rows, kv_format, head_dim):
        place[:] = part
    return rows


def write_rows(block_g: U8, rows: U8, kv_format: KvFormat, head_dim: int) -> None:
    """The inverse of `read_rows`: uint8 [64, g, B] into one layer's part of a block."""
    for part, place in _parts(block_g, rows, kv_format, head_dim):
        part[:] = place


def _parts(
    block_g: U8, rows: U8, kv_format: KvFormat, head_dim: int
) -> Iterator[tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]]:
    """Pairs of views of the same shape: a part of the block, and its place in the rows; none without heads."""
    if not len(block_g):
        return
    place = 0
    for part in _quantized(block_g, head_dim) if kv_format == KvFormat.Q8 else _plain(block_g, kv_format, head_dim):
        end = place + part[0, 0].nbytes // len(block_g)
        columns = rows[:, :, place:end].reshape(BLOCK_POSITIONS, len(block_g), -1)
        yield part, columns.view(part.dtype).reshape(part.shape)
        place = end


def _plain(block_g: U8, kv_format: KvFormat, P: int) -> Iterator[npt.NDArray[np.generic]]:
    """K and V, [4, 16, g, P] each, the bits of float32 or float16."""
    values_g = block_g.view(np.uint32 if kv_format == KvFormat.F32 else np.uint16)
    middle = BLOCK_POSITIONS * P
    yield values_g[:, :middle].reshape(-1, _TILES, P, _TILE).transpose(1, 3, 0, 2)
    yield values_g[:, middle : 2 * middle].reshape(-1, _TILES, _TILE, P).transpose(1, 2, 0, 3)


def _quantized(block_g: U8, P: int) -> Iterator[npt.NDArray[np.generic]]:
    """K's numbers and scales, then V's: [4, 16, g, ...]."""
    groups = -(-P // GROUP)
    heads, middle = len(block_g), _TILES * groups * _KEY_GROUP_BYTES
    keys = block_g[:, :middle].reshape(heads, _TILES, groups, _KEY_GROUP_BYTES)
    vectors = keys[..., : GROUP * _TILE].reshape(heads, _TILES, groups, GROUP // 4, _TILE, 4)
    yield vectors.transpose(1, 4, 0, 2, 3, 5)
    yield keys[..., GROUP * _TILE :].view(np.uint32).transpose(1, 3, 0, 2)
    scales = middle + BLOCK_POSITIONS * groups * GROUP
    yield block_g[:, middle:scales].reshape(heads, _TILES, _TILE, groups * GROUP).transpose(1, 2, 0, 3)
    end = scales + BLOCK_POSITIONS * groups * 4
    yield block_g[:, scales:end].view(np.uint32).reshape(heads, _TILES, _TILE, groups).transpose(1, 2, 0, 3)
