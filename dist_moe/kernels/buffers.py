"""What kernels read and write besides plain arrays: operands, lists of packed matrices and chunks, cache views.

Each class owns one C structure of dist_moe.h, builds it once and keeps alive the arrays that it points to.
Legend: T tokens, C columns, G groups of 32 columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_moe.kernels.arrays import (
    F32,
    I8,
    I32,
    I64,
    F32Array,
    I64Array,
    Pointer,
    U8Array,
    U64Array,
    address_of,
    aligned_empty,
    require_packed,
)
from dist_moe.kernels.formats import (
    ALIGNMENT,
    BLOCK_POSITIONS,
    GROUP,
    ChunkFormat,
    KvFormat,
    MatrixFormat,
    OperandParts,
    chunk_bytes,
    packed_bytes,
    parts_read,
)
from dist_moe.kernels.library import ffi
from dist_moe.model_config import round_up

CHUNK_WORDS = 4

assert ffi.sizeof("dm_chunk") == 8 * CHUNK_WORDS, "ChunkList lays dm_chunk out as 64-bit words"


class Operand:
    """What weights are multiplied with: up to `max_tokens` vectors, as f32 and, if `quantized`, as int8 too.

    Attributes:
        x_TC: float32 [max_tokens, C]; the caller or an earlier kernel fills it.
        q_TC: int8 [max_tokens, C rounded up to 32], filled by `Kernels.quantize`; empty unless quantized.
        scale_TG: float32 [max_tokens, ceil(C / 32)], likewise.
        sum_TG: int32 [max_tokens, ceil(C / 32)], the sum of each group of q_TC, likewise.
    """

    def __init__(self, max_tokens: int, columns: int, quantized: bool) -> None:
        """Allocate the arrays, 64-byte aligned and zeroed."""
        self.max_tokens = max_tokens
        self.columns = columns
        self.quantized = quantized
        rows = max_tokens if quantized else 0
        groups = -(-columns // GROUP)
        self.x_TC: F32Array = aligned_empty((max_tokens, columns), np.float32)
        self.q_TC = aligned_empty((rows, round_up(columns, GROUP)), np.int8)
        self.scale_TG: F32Array = aligned_empty((rows, groups), np.float32)
        self.sum_TG = aligned_empty((rows, groups), np.int32)
        for array in (self.x_TC, self.q_TC, self.scale_TG, self.sum_TG):
            array.fill(0)
        self._kept = (
            F32.write(self.x_TC, max_tokens, columns),
            I8.write(self.q_TC, rows, round_up(columns, GROUP)) if quantized else ffi.NULL,
            F32.write(self.scale_TG, rows, groups) if quantized else ffi.NULL,
            I32.write(self.sum_TG, rows, groups) if quantized else ffi.NULL,
        )
        self.struct: Pointer = ffi.new("dm_operand *", (*self._kept, columns))

    def for_parts(self, parts: OperandParts, tokens: int) -> Pointer:
        """The C structure, after checking that weights can read these parts of `tokens` vectors from it."""
        if tokens > self.max_tokens or (parts & OperandParts.INT8 and not self.quantized):
            raise TypeError(
                f"operand of {self.max_tokens} vectors, quantized={self.quantized}, asked for {tokens}, {parts!r}"
            )
        return self.struct


class MatrixList:
    """Packed matrices with the output column at which each one's rows begin (`dm_matrix`)."""

    def __init__(self, matrices: Sequence[tuple[U8Array, int, int, MatrixFormat]]) -> None:
        """Take (packed bytes uint8 [n] on a 64-byte boundary, rows, first output column, format) per matrix."""
        self._matrices = tuple(matrices)
        self.count = len(matrices)
        self.out_columns = max((column + rows for _, rows, column, _ in matrices), default=0)
        self.row_counts = frozenset(rows for _, rows, _, _ in matrices)
        self.parts = parts_read(fmt for *_, fmt in matrices)
        self.struct: Pointer = ffi.new("dm_matrix[]", self.count)
        for entry, (packed, rows, out_column, fmt) in zip(self.struct, matrices, strict=True):
            entry.packed = ffi.cast("void *", address_of(packed))
            entry.rows = rows
            entry.out_column = out_column
            entry.format = fmt.format
            entry.group = fmt.group
        self._checked_columns = -1

    def for_columns(self, columns: int) -> Pointer:
        """The C array, after checking (once) that every matrix is [its rows, columns] in its format."""
        if columns != self._checked_columns:
            for packed, rows, _, fmt in self._matrices:
                require_packed(packed, packed_bytes(fmt.format, rows, columns, fmt.group))
            self._checked_columns = columns
        return self.struct


class ChunkFormats:
    """How the chunks of some experts are packed (`dm_chunk_format`): an entry for each, or one if all are alike."""

    def __init__(self, formats: Sequence[ChunkFormat]) -> None:
        """Take the format of each, or one for all."""
        different = set(formats)
        entries = self._entries = formats[:1] if len(different) == 1 else formats
        self.count = len(entries)
        self.step = 0 if len(different) == 1 else 1
        self.normed_parts = parts_read(fmt.gate_up for fmt in different)
        self.struct: Pointer = ffi.new("dm_chunk_format[]", self.count)
        for entry, fmt in zip(self.struct, entries, strict=True):
            entry.format, entry.group = fmt.gate_up.format, fmt.gate_up.group
            entry.down_format, entry.down_group = fmt.down.format, fmt.down.group
            entry.read_cost = 1
        first, size = int(ffi.cast("uintptr_t", self.struct)), ffi.sizeof("dm_chunk_format")
        self.addresses: U64Array = first + size * np.arange(self.count, dtype=np.uint64)

    def set_read_costs(self, mean: int, model_dim: int, width: int) -> None:
        """What reading a chunk costs, by its bytes, where it is `mean` on average."""
        sizes = [chunk_bytes(fmt, model_dim, width) for fmt in self._entries]
        for entry, size in zip(self.struct, sizes, strict=True):
            entry.read_cost = max(1, round(mean * size * self.count / sum(sizes)))


class ChunkList:
    """A reusable list of expert chunks and of the tokens that each one serves (`dm_chunk`)."""

    def __init__(self, capacity: int) -> None:
        """Make room for `capacity` chunks."""
        self.capacity = capacity
        self.words: U64Array = np.zeros((capacity, CHUNK_WORDS), np.uint64)
        self.struct: Pointer = ffi.from_buffer("dm_chunk[]", self.words, require_writable=True)
        self.normed_parts = OperandParts(0)  # of what `set` put here
        self._formats: ChunkFormats | None = None

    def set(self, addresses: U64Array, formats: ChunkFormats, first: np.ndarray, count: np.ndarray) -> None:
        """Overwrite the first n chunks.

        Args:
            addresses: uint64 [n], of chunks on 64-byte boundaries; the caller keeps their memory alive.
            formats: Of each chunk, or of all.
            first: Integers [n], where the chunk's entries begin in the step's token and weight lists.
            count: Integers [n], how many entries it has; zero is allowed.
        """
        n = len(addresses)
        self.words[:n, 0] = addresses
        self.words[:n, 1] = formats.addresses
        self.words[:n, 2] = first
        self.words[:n, 3] = count
        self._formats, self.normed_parts = formats, formats.normed_parts


class KvView:
    """Where the keys and values of a step's tokens stand in the cache (`dm_kv_view`)."""

    def __init__(
        self,
        blocks: Sequence[U8Array] | U64Array,
        table_T: I64Array,
        position_T: I64Array,
        layer_offset: int,
        fmt: KvFormat,
    ) -> None:
        """Point at the blocks of a step.

        Args:
            blocks: The sequences' position blocks, 64-byte aligned: arrays, kept alive here, or their addresses as
                uint64 [n], kept alive by the caller.
            table_T: int64 [T]; entry `table_T[t] + b` of `blocks` is position block b of token t's sequence.
            position_T: int64 [T], each token's position.
            layer_offset: Bytes from a block's begin to the layer's part (a whole half layer brings its own).
            fmt: How the cache keeps numbers.
        """
        self.format = fmt
        self.tokens = len(position_T)
        self.position_T = position_T
        if isinstance(blocks, np.ndarray):
            self._addresses = np.ascontiguousarray(blocks, np.uint64)
        else:
            self._addresses = np.array([address_of(block) for block in blocks], np.uint64)
        last_T = table_T + position_T // BLOCK_POSITIONS
        if self.tokens and (int(last_T.max()) >= len(self._addresses) or int(table_T.min()) < 0):
            raise TypeError(f"cache view of {len(self._addresses)} blocks does not reach block {int(last_T.max())}")
        if np.any(self._addresses % ALIGNMENT):
            raise TypeError(f"cache blocks must begin on {ALIGNMENT}-byte boundaries")
        self._kept = (
            blocks,
            ffi.from_buffer("uint8_t *[]", self._addresses),
            I64.read(table_T, self.tokens),
            I64.read(position_T, self.tokens),
        )
        self.struct: Pointer = ffi.new("dm_kv_view *", (*self._kept[1:], layer_offset, int(fmt)))
