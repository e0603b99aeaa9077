"""From a checkpoint's matrices to packed units and common tensors, some units at a time.

D model dim, P head dim, F hidden units, w chunk width. Units are packed in lists of about `_LIST_BYTES`, straight from
the mapped file if it has bf16 or f32. Private memory beyond that is what a source must decode first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dist_moe.checkpoint.source import MappedSource, Source
from dist_moe.kernels import Kernels, PackMatrix, aligned_empty
from dist_moe.kernels.formats import VOCABULARY_BLOCK, MatrixFormat, WeightFormat, packed_bytes
from dist_moe.store.carry import is_carried, pack_blocks
from dist_moe.store.importance import Importance, column_importance
from dist_moe.store.layout import TensorSpec
from dist_moe.store.manifest import Manifest
from dist_moe.store.unit_parts import UnitPart, unit_bytes, unit_parts
from dist_moe.store.units import UnitKind

Floats = npt.NDArray[np.float32]
Packed = npt.NDArray[np.uint8]

_ALL = slice(None)
_BLOCK_BYTES = 32 << 20  # f32 bytes of one piece of a long table
_LIST_BYTES = 16 << 20  # of packed units that are made at once
_WHOLE_DOWN_BYTES = 256 << 20  # a down matrix up to this size is decoded once for all of its chunks
_BF16_EXPONENT = np.uint16(0x7F80)


class UnitPacker(Protocol):
    """What a weight file is made of, one unit or tensor at a time."""

    @property
    def nonfinite(self) -> Mapping[str, int]:
        """The weights so far that could not be packed, per source tensor."""

    def units(self, kind: UnitKind, layer: int, indices: Sequence[int], counted: Sequence[bool]) -> Iterator[Packed]:
        """The packed units in order, uint8 [unit bytes] each; `counted` says which of them enter `nonfinite`."""

    def common(self, spec: TensorSpec) -> Iterator[npt.NDArray[Any]]:
        """One tensor of the common file in pieces."""


class Packer:
    """Packs the units of one store. `nonfinite` counts the weights that cannot be packed, per source tensor."""

    def __init__(
        self, source: Source, manifest: Manifest, kernels: Kernels, importance: Importance | None = None
    ) -> None:
        """Take the checkpoint, the plan of the store, the kernels that pack, and what weights the scales' error."""
        self._source = source
        self._importance = importance
        self._manifest = manifest
        self._config = manifest.config
        self._kernels = kernels
        self._down_name = ""
        self._down_DF: Floats | None = None
        self._scale_D: Floats | None = None
        self._matrices: list[PackMatrix] = []
        self._formats: list[WeightFormat] = []  # of the matrices
        self._names: list[str] = []  # of the matrices; "" for what is not counted
        self._counted = True
        self.nonfinite = Counter[str]()

    def units(self, kind: UnitKind, layer: int, indices: Sequence[int], counted: Sequence[bool]) -> Iterator[Packed]:
        """The packed units in order, of equal formats, uint8 [unit bytes]; `counted`: which enter `nonfinite`."""
        size = unit_bytes(self._manifest, kind, layer, indices[0]) if indices else 0
        step = max(1, _LIST_BYTES // max(1, size))
        for first in range(0, len(indices), step):
            numbers = indices[first : first + step]
            packed: Packed = aligned_empty((len(numbers), size), np.uint8)
            for unit, index, self._counted in zip(packed, numbers, counted[first:], strict=False):
                self._add_unit(unit, kind, layer, index)
            self._pack_list()
            yield from packed

    def _add_unit(self, unit: Packed, kind: UnitKind, layer: int, index: int) -> None:
        parts = unit_parts(self._manifest, kind, layer, index)
        if kind == "chunk":
            self._pack_chunk(unit, parts, layer, index)
        elif kind == "vocabulary":
            rows = slice(index * VOCABULARY_BLOCK, min((index + 1) * VOCABULARY_BLOCK, self._config.vocabulary))
            self._pack_slice("lm_head", unit, parts[0].format, rows, height=VOCABULARY_BLOCK)
        else:
            own = slice(index * self._config.head_dim, (index + 1) * self._config.head_dim)
            for part in parts:
                rows, columns = (_ALL, own) if part.key == "o" else (own, _ALL)
                self._pack_slice(f"layers.{layer}.{part.key}", unit[part.bytes], part.format, rows, columns)

    def common(self, spec: TensorSpec) -> Iterator[npt.NDArray[Any]]:
        """One tensor of the common file in pieces."""
        if spec.dtype == "U8":
            rows, columns = self._source.shape(spec.name)
            fmt = self._manifest.router_format
            packed: Packed = aligned_empty(packed_bytes(fmt, rows, columns, 0), np.uint8)
            self._count(spec.name, self._kernels.pack(packed, self._source.read(spec.name), None, fmt, 0))
            yield packed
            return
        row_bytes = 4 * int(np.prod(spec.shape[1:], dtype=np.int64))
        step = max(1, _BLOCK_BYTES // row_bytes)
        for first in range(0, spec.shape[0], step):
            yield self._piece(spec, slice(first, first + step))

    def _piece(self, spec: TensorSpec, rows: slice) -> npt.NDArray[Any]:
        """Some rows of a common tensor."""
        stored = self._stored(spec.name, rows)
        if stored is not None and stored.dtype == np.uint16 and spec.dtype == "BF16":
            self._count(spec.name, int(np.count_nonzero((stored & _BF16_EXPONENT) == _BF16_EXPONENT)))
            return stored
        values = self._source.read(spec.name, rows)
        self._count(spec.name, values.size - int(np.count_nonzero(np.isfinite(values))))
        return (values.view(np.uint32) >> 16).astype("<u2") if spec.dtype == "BF16" else values

    def _pack_chunk(self, unit: Packed, parts: Sequence[UnitPart], layer: int, index: int) -> None:
        expert, chunk = divmod(index, self._manifest.layer_chunks_per_expert(layer))
        name = f"layers.{layer}.experts.{expert}."
        *rows_parts, down = parts
        width = down.columns
        hidden = slice(chunk * width, min((chunk + 1) * width, self._config.layer_hidden(layer)))
        for part in rows_parts:
            self._pack_slice(name + part.key, unit[part.bytes], part.format, hidden, height=width)
        if self._carry(name + "down", unit[down.bytes], down.format, _ALL, hidden):
            return
        self._open_down(name + "down", down.format)
        down_Dw = self._stored(name + "down", _ALL, hidden)
        if down_Dw is None and self._down_DF is not None:
            down_Dw = self._down_DF[:, hidden]
        if down_Dw is None:
            down_Dw = self._source.read(name + "down", columns=hidden)
        shape = (down.rows, width)
        self._add(name + "down", unit[down.bytes], down_Dw, shape, down.format, hidden, self._scale_D)

    def _open_down(self, name: str, own: MatrixFormat) -> None:
        """Decode a down matrix once for all of its chunks, if it is small, and find the scales of its whole rows."""
        if name == self._down_name:
            return
        rows, columns = self._source.shape(name)
        self._down_name, self._scale_D = name, None
        self._down_DF = None
        if self._stored(name, _ALL) is None and rows * columns * 4 <= _WHOLE_DOWN_BYTES:
            self._down_DF = self._source.read(name)
        if own.format.quantized and own.group == 0:
            self._scale_D = np.empty(rows, np.float32)
            importance_F = column_importance(self._importance, name, columns)
            step = max(1, _BLOCK_BYTES // (4 * columns))
            for first in range(0, rows, step):
                block = slice(first, min(first + step, rows))
                values = self._source.read(name, block) if self._down_DF is None else self._down_DF[block]
                self._kernels.row_scales(self._scale_D[block], values, own.format, self._manifest.scales, importance_F)

    def _pack_slice(
        self, name: str, packed: Packed, own: MatrixFormat, rows: slice = _ALL, columns: slice = _ALL, height: int = 0
    ) -> None:
        """Pack a slice of a matrix, zero-padded to `height` rows."""
        if self._carry(name, packed, own, rows, columns, height):
            return
        values_RC = self._stored(name, rows, columns)
        if values_RC is None:
            values_RC = self._source.read(name, rows, None if columns == _ALL else columns)
        given, wide = values_RC.shape
        self._add(name, packed, values_RC, (max(height, given), wide), own, columns)

    def _carry(
        self, name: str, packed: Packed, own: MatrixFormat, rows: slice, columns: slice, height: int = 0
    ) -> bool:
        """Pack a slice bit for bit if the source has it in this format."""
        if not is_carried(self._source.source_dtype(name), own.format, own.group):
            return False
        blocks = self._source.blocks(name, rows, columns)
        if blocks is not None:
            self._count(name, pack_blocks(packed, blocks, own.format, height))
        return blocks is not None

    def _stored(self, name: str, rows: slice, columns: slice | None = None) -> npt.NDArray[Any] | None:
        """A slice in the mapped file, if the kernels can read it there."""
        return self._source.stored(name, rows, columns) if isinstance(self._source, MappedSource) else None

    def _add(
        self,
        name: str,
        packed: Packed,
        weights_RC: npt.NDArray[Any],
        shape: tuple[int, int],
        own: MatrixFormat,
        columns: slice,
        scale_R: Floats | None = None,
    ) -> None:
        """Enter some columns of a matrix into the list, to be filled up with zeros to a shape."""
        importance_C = column_importance(self._importance, name, self._source.shape(name)[1], columns, shape[1])
        self._matrices.append(PackMatrix(packed, weights_RC, *shape, own.group, scale_R, importance_C))
        self._formats.append(own.format)
        self._names.append(name if self._counted else "")

    def _pack_list(self) -> None:
        for fmt in dict.fromkeys(self._formats):
            some = [place for place, own in enumerate(self._formats) if own == fmt]
            matrices = [self._matrices[place] for place in some]
            counts = self._kernels.pack_matrices(matrices, fmt, self._manifest.scales)
            for place, count in zip(some, counts, strict=True):
                if count and self._names[place]:
                    self.nonfinite[self._names[place]] += count
        self._matrices, self._formats, self._names = [], [], []

    def _count(self, name: str, nonfinite: int) -> None:
        if nonfinite and self._counted:
            self.nonfinite[name] += nonfinite
