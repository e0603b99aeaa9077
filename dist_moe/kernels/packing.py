"""Packs weights that are integers with scales already: their bits are moved, none is computed.

Legend: R matrix rows, G groups of 32 columns. The layout is written down in reference.unpack_matrix.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_moe.kernels.arrays import Array, U8Array, require_packed
from dist_moe.kernels.formats import GROUP, TILE_ROWS, WeightFormat, packed_bytes
from dist_moe.model_config import round_up

ZERO_CODES = {WeightFormat.Q4: 0x88, WeightFormat.Q8: 0x80}  # a byte of weights that are 0


def pack_codes(packed: U8Array, scale_RG: npt.NDArray[np.float16], codes_RG: Array, fmt: WeightFormat) -> int:
    """Pack a matrix with one scale per 32 columns; rows beyond those given are zeros.

    Args:
        packed: Receives `packed_bytes(fmt, rows, 32 * G, 32)` bytes, where the rows are R or more.
        scale_RG: The scales, float16 [R, G].
        codes_RG: q4: uint8 [R, G, 16], byte i holds value + 8 of columns i and 16 + i in its low and high half.
            q8: uint8 [R, G, 32], value + 128.
        fmt: Q4 or Q8.

    Returns:
        How many weights have a scale that is NaN or infinite; their scale becomes 0.
    """
    rows, groups = scale_RG.shape
    tile_bytes = packed_bytes(fmt, 1, GROUP * groups, GROUP)
    tiles = len(packed) // tile_bytes
    require_packed(packed, tiles * tile_bytes)
    if tiles * TILE_ROWS < rows:
        raise TypeError(f"{rows} rows do not fit into {tiles} tiles of {TILE_ROWS}")
    tile_tb = packed.reshape(tiles, tile_bytes)
    finite_RG = np.isfinite(scale_RG)
    scale_bytes = round_up(groups * TILE_ROWS * 2, 64)
    tile_tb[:, :scale_bytes] = 0
    scales = _padded(np.where(finite_RG, scale_RG, np.float16(0)), tiles, 0)
    tile_tb[:, : groups * TILE_ROWS * 2].view(np.float16).reshape(tiles, groups, TILE_ROWS)[...] = scales.swapaxes(1, 2)
    words = _padded(np.ascontiguousarray(codes_RG), tiles, ZERO_CODES[fmt]).view(np.uint32)
    vectors = tile_tb[:, scale_bytes:].view(np.uint32).reshape(tiles, groups, words.shape[-1], TILE_ROWS)
    vectors[...] = words.transpose(0, 2, 3, 1)
    return GROUP * int(np.count_nonzero(~finite_RG))


def _padded(values_R: Array, tiles: int, fill: int) -> Array:
    """[R, ...] -> [tiles, 16, ...], rows beyond R filled."""
    missing = tiles * TILE_ROWS - len(values_R)
    if missing:
        values_R = np.concatenate([values_R, np.full((missing, *values_R.shape[1:]), fill, values_R.dtype)])
    return values_R.reshape(tiles, TILE_ROWS, *values_R.shape[1:])
