"""One group of matrices rounded to q4 in a running model, to measure how much the predictions suffer from it.

The groups of a model: of each layer q, k, v, o, gate and up of all experts, down of all experts; then lm_head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import Kernels, aligned_empty
from dist_moe.model.transformer import Transformer
from dist_moe.model.weights import ModelWeights, attention_weights, expert_weights, vocabulary_weights
from dist_moe.store.calibration import GROUPS_OF_LAYER, REFERENCE
from dist_moe.store.reader import Store
from dist_moe.store.rounded import round_weights
from dist_moe.store.unit_parts import unit_parts
from dist_moe.store.units import UnitKind

Packed = npt.NDArray[np.uint8]


class Rounder:
    """One rank's weights, with one group of matrices rounded at a time."""

    def __init__(self, model: Transformer) -> None:
        """Nothing is rounded yet."""
        self._model = model
        self._whole: ModelWeights | None = None
        self._rounded: RoundedUnits | None = None  # keeps alive what the kernels read

    def round(self, group: int) -> None:
        """Round this group, and no other any more; -1 rounds none. All ranks do it alike, between steps."""
        model = self._model
        whole = self._whole = self._whole or model.weights
        model.weights, self._rounded = whole, None
        if group < 0:
            return
        layer, kind = divmod(group, len(GROUPS_OF_LAYER))
        keys = GROUPS_OF_LAYER[kind] if layer < model.config.layers else ("lm_head",)
        store, share = whole.store, model.share
        units = self._rounded = RoundedUnits(model.kernels, store, keys)
        if layer == model.config.layers:
            model.weights = replace(whole, vocabulary=vocabulary_weights(store, units, share.plan))
            return
        layers = list(whole.layers)
        if "gate" in keys or "down" in keys:
            layers[layer] = replace(layers[layer], experts=expert_weights(store, units, share, layer))
        else:
            offset = layer * model.cache.layer_bytes
            layers[layer] = replace(layers[layer], attention=attention_weights(store, units, share, layer, offset))
        model.weights = replace(whole, layers=tuple(layers))


class RoundedUnits:
    """The units of a store with some of their matrices rounded, packed as they were (a `UnitSource`)."""

    def __init__(self, kernels: Kernels, store: Store, keys: tuple[str, ...]) -> None:
        """Round the matrices called so, as they are asked for."""
        self._kernels, self._store, self._keys = kernels, store, keys
        self._chunks: list[Packed] = []

    def common(self, name: str) -> npt.NDArray[Any]:
        """As Store.common."""
        return self._store.common(name)

    def unit(self, kind: UnitKind, layer: int, index: int) -> Packed:
        """As Store.unit, in memory of its own."""
        unit = self._store.unit(kind, layer, index)
        copy: Packed = aligned_empty(unit.shape, np.uint8)
        copy[:] = unit
        for part in unit_parts(self._store.manifest, kind, layer, index):
            if part.key in self._keys:
                values_RC: npt.NDArray[np.float32] = np.empty((part.rows, part.columns), np.float32)
                self._kernels.unpack(values_RC, copy[part.bytes], part.format.format, part.format.group)
                rounded_RC = round_weights(self._kernels, values_RC, REFERENCE, None)
                self._kernels.pack(copy[part.bytes], rounded_RC, None, part.format.format, part.format.group)
        return copy

    def chunk_addresses(self, layer: int, wanted: Iterable[int]) -> npt.NDArray[np.uint64]:
        """As Store.chunk_addresses, but 0 for every chunk that is not wanted; valid as long as this object is."""
        addresses = np.zeros_like(self._store.unit_addresses("chunk", layer))
        for index in wanted:
            self._chunks.append(self.unit("chunk", layer, index))
            addresses[index] = self._chunks[-1].ctypes.data
        return addresses
