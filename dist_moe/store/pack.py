"""From a checkpoint's matrices to packed units and common tensors, one at a time.

D model dim, P head dim, F hidden units, w chunk width. Private memory stays near one expert's down matrix, and below
`_WHOLE_DOWN_BYTES` for the widest dense MLPs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dist_moe.checkpoint.source import Source
from dist_moe.kernels import Kernels, aligned_empty
from dist_moe.kernels.formats import VOCABULARY_BLOCK, packed_bytes
from dist_moe.store.carry import is_carried, pack_blocks
from dist_moe.store.layout import TensorSpec
from dist_moe.store.manifest import Manifest
from dist_moe.store.units import UnitKind, head_row_bytes, output_group, unit_bytes

Floats = npt.NDArray[np.float32]
Packed = npt.NDArray[np.uint8]

_ALL = slice(None)
_BLOCK_BYTES = 32 << 20  # f32 bytes of one piece of a long table
_WHOLE_DOWN_BYTES = 256 << 20  # a down matrix up to this size is widened once for all of its chunks


class UnitPacker(Protocol):
    """What a weight file is made of, one unit or tensor at a time."""

    @property
    def nonfinite(self) -> Mapping[str, int]:
        """The weights so far that could not be packed, per source tensor."""

    def unit(self, kind: UnitKind, layer: int, index: int, counted: bool = True) -> Packed:
        """One packed unit, uint8 [unit bytes]; `counted` says whether it enters `nonfinite`."""

    def common(self, spec: TensorSpec) -> Iterator[npt.NDArray[Any]]:
        """One tensor of the common file in pieces."""


class Packer:
    """Packs the units of one store. `nonfinite` counts the weights that cannot be packed, per source tensor."""

    def __init__(self, source: Source, manifest: Manifest, kernels: Kernels) -> None:
        """Take the checkpoint, the plan of the store and the kernels that pack."""
        self._source = source
        self._manifest = manifest
        self._config = manifest.config
        self._kernels = kernels
        self._down_name = ""
        self._down_DF: Floats | None = None
        self._scale_D: Floats | None = None
        self._counted = True
        self.nonfinite = Counter[str]()

    def unit(self, kind: UnitKind, layer: int, index: int, counted: bool = True) -> Packed:
        """One packed unit, uint8 [unit bytes]; `counted` says whether it enters `nonfinite`."""
        manifest = self._manifest
        self._counted = counted
        unit: Packed = aligned_empty(
            unit_bytes(self._config, manifest.format, manifest.group_size, kind, layer), np.uint8
        )
        if kind == "head":
            self._pack_head(unit, layer, index)
        elif kind == "kv_head":
            self._pack_kv_head(unit, layer, index)
        elif kind == "chunk":
            self._pack_chunk(unit, layer, index)
        else:
            rows = slice(index * VOCABULARY_BLOCK, min((index + 1) * VOCABULARY_BLOCK, self._config.vocabulary))
            self._pack_slice("lm_head", unit, manifest.group_size, rows, height=VOCABULARY_BLOCK)
        return unit

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
            values = self._source.read(spec.name, slice(first, first + step))
            self._count(spec.name, values.size - int(np.count_nonzero(np.isfinite(values))))
            yield (values.view(np.uint32) >> 16).astype("<u2") if spec.dtype == "BF16" else values

    def _pack_head(self, unit: Packed, layer: int, head: int) -> None:
        name, cut = f"layers.{layer}.", self._row_bytes()
        columns = slice(head * self._config.head_dim, (head + 1) * self._config.head_dim)
        group_size = self._manifest.group_size
        self._pack_slice(name + "q", unit[:cut], group_size, columns)
        self._pack_slice(name + "o", unit[cut:], output_group(self._config, group_size), columns=columns)

    def _pack_kv_head(self, unit: Packed, layer: int, head: int) -> None:
        name, cut = f"layers.{layer}.", self._row_bytes()
        rows = slice(head * self._config.head_dim, (head + 1) * self._config.head_dim)
        for key, half in (("k", unit[:cut]), ("v", unit[cut:])):
            self._pack_slice(name + key, half, self._manifest.group_size, rows)

    def _pack_chunk(self, unit: Packed, layer: int, index: int) -> None:
        manifest, model_dim = self._manifest, self._config.model_dim
        width = manifest.layer_chunk_width(layer)
        expert, chunk = divmod(index, manifest.layer_chunks_per_expert(layer))
        name = f"layers.{layer}.experts.{expert}."
        hidden = slice(chunk * width, min((chunk + 1) * width, self._config.layer_hidden(layer)))
        cut = packed_bytes(manifest.format, width, model_dim, manifest.group_size)
        for key, part in (("gate", unit[:cut]), ("up", unit[cut : 2 * cut])):
            self._pack_slice(name + key, part, manifest.group_size, hidden, height=width)
        if self._carry(name + "down", unit[2 * cut :], manifest.group_size, _ALL, hidden):
            return
        self._open_down(name + "down")
        if self._down_DF is None:
            down_Dw = self._source.read(name + "down", columns=hidden)
        else:
            down_Dw = self._down_DF[:, hidden]
        down_Dw = _padded(down_Dw, model_dim, width)
        self._pack(name + "down", unit[2 * cut :], down_Dw, manifest.group_size, self._scale_D)

    def _open_down(self, name: str) -> None:
        """Widen a down matrix once for all of its chunks, if it is small, and find the scales of its whole rows."""
        if name == self._down_name:
            return
        fmt = self._manifest.format
        rows, columns = self._source.shape(name)
        self._down_name, self._scale_D = name, None
        self._down_DF = None if rows * columns * 4 > _WHOLE_DOWN_BYTES else self._source.read(name)
        if fmt.quantized and self._manifest.group_size == 0:
            self._scale_D = np.empty(rows, np.float32)
            step = max(1, _BLOCK_BYTES // (4 * columns))
            for first in range(0, rows, step):
                block = slice(first, min(first + step, rows))
                values = self._source.read(name, block) if self._down_DF is None else self._down_DF[block]
                self._kernels.row_scales(self._scale_D[block], values, fmt)

    def _pack_slice(
        self, name: str, packed: Packed, group: int, rows: slice = _ALL, columns: slice = _ALL, height: int = 0
    ) -> None:
        """Pack a slice of a matrix, zero-padded to `height` rows."""
        if self._carry(name, packed, group, rows, columns, height):
            return
        values_RC = self._source.read(name, rows, None if columns == _ALL else columns)
        self._pack(name, packed, _padded(values_RC, max(height, len(values_RC)), values_RC.shape[1]), group)

    def _carry(self, name: str, packed: Packed, group: int, rows: slice, columns: slice, height: int = 0) -> bool:
        """Pack a slice bit for bit if the source has it in this format."""
        if not is_carried(self._source.source_dtype(name), self._manifest.format, group):
            return False
        blocks = self._source.blocks(name, rows, columns)
        if blocks is not None:
            self._count(name, pack_blocks(packed, blocks, self._manifest.format, height))
        return blocks is not None

    def _pack(self, name: str, packed: Packed, weights_RC: Floats, group: int, scale_R: Floats | None = None) -> None:
        self._count(name, self._kernels.pack(packed, weights_RC, scale_R, self._manifest.format, group))

    def _count(self, name: str, nonfinite: int) -> None:
        if nonfinite and self._counted:
            self.nonfinite[name] += nonfinite

    def _row_bytes(self) -> int:
        return head_row_bytes(self._config, self._manifest.format, self._manifest.group_size)


def _padded(values_RC: Floats, rows: int, columns: int) -> Floats:
    if values_RC.shape == (rows, columns):
        return values_RC
    padded = np.zeros((rows, columns), np.float32)
    padded[: values_RC.shape[0], : values_RC.shape[1]] = values_RC
    return padded
