"""Checksums: xxh3 with 64 bits, the only door to xxhash."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

Bytes = bytes | memoryview | npt.NDArray[Any]

_SLICE_BYTES = 1 << 24  # one call over a whole mapped file would keep the interpreter from seeing Ctrl-C


def bytes_of(data: Bytes) -> memoryview:
    """The bytes of C-contiguous data, without a copy."""
    return memoryview(data.data if isinstance(data, np.ndarray) else data).cast("B")


class RunningChecksum:
    """The checksum of bytes that arrive piece by piece."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._state = xxhash.xxh3_64()

    def update(self, data: Bytes) -> None:
        """Append bytes (C-contiguous)."""
        view = bytes_of(data)
        for start in range(0, len(view), _SLICE_BYTES):
            self._state.update(view[start : start + _SLICE_BYTES])

    def text(self) -> str:
        """The checksum so far: 16 hexadecimal digits."""
        return f"{self._state.intdigest():016x}"

    def value(self) -> int:
        """The checksum so far, an unsigned 64-bit number."""
        return self._state.intdigest()


def checksum_text(*parts: Bytes) -> str:
    """The checksum of bytes: 16 hexadecimal digits."""
    running = RunningChecksum()
    for part in parts:
        running.update(part)
    return running.text()


def checksum_rows(rows: Iterable[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint64]:
    """One checksum per row of bytes."""
    return np.array([xxhash.xxh3_64_intdigest(row.data) for row in rows], dtype=np.uint64)
