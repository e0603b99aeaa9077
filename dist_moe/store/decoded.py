"""A store's tensors as numbers again, under the logical names of checkpoints, each unit compared with its checksum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.checkpoint.names import Location, locations
from dist_moe.kernels import Kernels
from dist_moe.kernels.formats import MatrixFormat, WeightFormat
from dist_moe.model_config import ModelConfig
from dist_moe.store.manifest import Manifest
from dist_moe.store.matrices import MatrixPiece, MatrixPlace, matrix_pieces, matrix_place, piece_scales, piece_values
from dist_moe.store.reader import Store
from dist_moe.store.sealed import Sealed
from dist_moe.store.verify import check_sealed

_ALL = slice(None)
_PIECE_VALUES = 1 << 20
_LM_HEAD = "lm_head.weight"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scales:
    """How a slice is quantized.

    Attributes:
        scale_RG: float16 [rows, groups], of the slice's rows.
        group: Columns per scale, 0 for all.
    """

    scale_RG: npt.NDArray[np.float16]
    group: int


@dataclass(frozen=True)
class Slice:
    """A part of a tensor.

    Attributes:
        rows: Which; of a vector, which elements.
        columns: Which.
        values: float32 [rows, columns] or [n].
        scales: Of a matrix in q8 or q4.
        padding: Values beside the matrix in its unit that are not 0, as they should be.
    """

    rows: slice
    columns: slice
    values: Floats
    scales: Scales | None = None
    padding: int = 0


def tensor_places(config: ModelConfig) -> dict[str, Location]:
    """The Hugging Face tensor and shape of every logical name, one tensor per expert, in the order of the pass."""
    places = locations(config, ())
    # A store keeps lm_head of its own, even where the source has the embedding for it.
    return places | {"lm_head": Location(_LM_HEAD, (config.vocabulary, config.model_dim))}


class DecodedStore:
    """Slices of a store's tensors, float32: what the kernels compute with."""

    def __init__(self, store: Store, kernels: Kernels) -> None:
        """Take an open store, of which not all shards need be here, and the kernels that unpack."""
        self._store = store
        self._kernels = kernels
        self._commons = {sealed.tensor: sealed for sealed in store.sealed_common()}
        self._places = tensor_places(store.config)

    @property
    def manifest(self) -> Manifest:
        """The store's."""
        return self._store.manifest

    def names(self) -> list[str]:
        """All logical names, in the order of the forward pass."""
        return list(self._places)

    def tensor(self, name: str) -> str:
        """What Hugging Face calls it."""
        return self._places[name].tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """[rows, columns] or [n]."""
        return self._places[name].tensor_shape

    def format(self, name: str) -> MatrixFormat:
        """How the store keeps a tensor; group 0 of what has no scales."""
        manifest, place = self.manifest, self._matrix(name)
        if place is not None:
            return manifest.matrix_format(place.key, place.layer, place.expert)
        formats = {"router": manifest.router_format, "embedding": manifest.embedding_format}
        return MatrixFormat(formats.get(name.split(".")[-1], WeightFormat.F32), 0)

    def require(self, name: str) -> None:
        """Raise StoreError unless all of a tensor is on this machine; it says what brings the rest."""
        place = self._matrix(name)
        if place is not None:
            self._store.require(place.kind, place.layer, place.units)

    def is_by_rows(self, name: str) -> bool:
        """Whether each slice of a tensor has all columns."""
        return name.split(".")[-1] not in ("o", "down")

    def slices(self, name: str) -> Iterator[Slice]:
        """A tensor in ascending slices of rows or of columns; StoreError if a unit is absent or damaged."""
        place = self._matrix(name)
        if place is None:
            yield from self._common_slices(name)
            return
        self.require(name)
        for piece in matrix_pieces(self.manifest, place):
            sealed = self._store.sealed_unit(place.kind, place.layer, piece.unit)
            check_sealed(sealed)
            yield self._slice(name, sealed, piece)

    def whole(self, name: str) -> Floats:
        """A whole tensor; raises as `slices`."""
        values = np.empty(self.shape(name), np.float32)
        for part in self.slices(name):
            values[part.rows if values.ndim == 1 else (part.rows, part.columns)] = part.values
        return values

    def _matrix(self, name: str) -> MatrixPlace | None:
        return matrix_place(self.manifest.config, self.manifest.group_size, name)

    def _slice(self, name: str, sealed: Sealed, piece: MatrixPiece) -> Slice:
        all_rows, all_columns = self.shape(name)
        padded_RC = piece_values(self._kernels, sealed.data, piece)
        rows, columns = len(range(all_rows)[piece.rows]), len(range(all_columns)[piece.columns])
        values_RC = padded_RC[:rows, :columns]
        padding = (
            int(np.count_nonzero(padded_RC) - np.count_nonzero(values_RC)) if values_RC.size < padded_RC.size else 0
        )
        scales = None
        if piece.format.format.quantized:
            scales = Scales(piece_scales(sealed.data, piece)[:rows], piece.format.group)
        return Slice(piece.rows, piece.columns, values_RC, scales, padding)

    def _common_slices(self, name: str) -> Iterator[Slice]:
        sealed, shape, fmt = self._commons[name], self.shape(name), self.format(name).format
        check_sealed(sealed)
        if name.endswith(".router"):
            values_RC = np.empty(shape, np.float32)
            self._kernels.unpack(values_RC, sealed.data, fmt, 0)
            yield Slice(_ALL, _ALL, values_RC)
            return
        table = sealed.data.view("<u2" if fmt == WeightFormat.BF16 else "<f4").reshape(shape)
        step = max(1, _PIECE_VALUES // int(np.prod(shape[1:], dtype=np.int64)))
        for first in range(0, shape[0], step):
            rows = slice(first, min(first + step, shape[0]))
            part = table[rows]
            widened = (part.astype(np.uint32) << 16).view(np.float32) if fmt == WeightFormat.BF16 else part
            yield Slice(rows, _ALL, widened)
