"""Weights copied into private memory of huge pages, for machines where that streams faster than the mapped files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe.huge_pages import huge_page_memory
from dist_moe.kernels import ALIGNMENT
from dist_moe.store.reader import Store
from dist_moe.store.sealed import Sealed
from dist_moe.store.units import UnitKind

_ARENA_BYTES = 256 << 20


_Pair = tuple[npt.NDArray[Any], npt.NDArray[Any]]  # a copy and its source


class PrivateCopy:
    """Copies of what one rank reads. Views are handed out at once, but hold the weights only after `fill`."""

    def __init__(self, store: Store) -> None:
        """Nothing is copied yet."""
        self._store = store
        self._arenas: list[npt.NDArray[np.uint8]] = []
        self._used_bytes = 0  # of the last arena
        self._pending: list[_Pair] = []
        self._units: dict[tuple[UnitKind, int, int], npt.NDArray[np.uint8]] = {}
        self._common: dict[str, npt.NDArray[Any]] = {}

    def common(self, name: str) -> npt.NDArray[Any]:
        """As Store.common."""
        self._common[name] = copy = self._copy(self._store.common(name))
        return copy

    def unit(self, kind: UnitKind, layer: int, index: int) -> npt.NDArray[np.uint8]:
        """As Store.unit."""
        self._units[kind, layer, index] = copy = self._copy(self._store.unit(kind, layer, index))
        return copy

    def chunk_addresses(self, layer: int, wanted: Iterable[int]) -> npt.NDArray[np.uint64]:
        """As Store.unit_addresses, but 0 for every chunk that is not wanted; valid as long as this object is."""
        addresses = np.zeros_like(self._store.unit_addresses("chunk", layer))
        for index in wanted:
            addresses[index] = self.unit("chunk", layer, index).ctypes.data
        return addresses

    def sealed(self) -> Iterator[Sealed]:
        """Everything that was copied, with the checksum that the file has for it."""
        common = {sealed.tensor: sealed for sealed in self._store.sealed_common()}
        for name, copy in self._common.items():
            yield replace(common[name], data=copy.reshape(-1).view(np.uint8), copied=True)
        for place, unit in self._units.items():
            yield replace(self._store.sealed_unit(*place), data=unit, copied=True)

    def fill(self, threads: int) -> Iterator[tuple[int, int]]:
        """Copy everything that was handed out, yielding the bytes that are done and all of them."""
        total_bytes, done_bytes = sum(source.nbytes for _, source in self._pending), 0
        with ThreadPoolExecutor(threads) as pool:
            for _, source in pool.map(_copied, self._pending):
                done_bytes += source.nbytes
                yield done_bytes, total_bytes
        self._pending.clear()

    def _copy(self, source: npt.NDArray[Any]) -> npt.NDArray[Any]:
        copy = self._take(source.nbytes).view(source.dtype).reshape(source.shape)
        self._pending.append((copy, source))
        return copy

    def _take(self, count: int) -> npt.NDArray[np.uint8]:
        """So many bytes on a boundary of ALIGNMENT."""
        if not self._arenas or self._used_bytes + count > len(self._arenas[-1]):
            self._arenas.append(huge_page_memory(max(_ARENA_BYTES, count)))
            self._used_bytes = 0
        taken = self._arenas[-1][self._used_bytes : self._used_bytes + count]
        self._used_bytes += -(-count // ALIGNMENT) * ALIGNMENT
        return taken


def _copied(pair: _Pair) -> _Pair:
    np.copyto(*pair)
    return pair
