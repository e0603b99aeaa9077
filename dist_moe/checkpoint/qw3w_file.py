"""QW3W files, v1 and v2, as moe.cc's export and convert write them: named records, one after another up to the end.

Little-endian: "QW3W", 0, version; u32 count (of source tensors, not of records: ignored, as moe.cc does); per record
u32 name length, name, u32 dtype, u32 dimensions, u32 shape, data, and from v2 on u32 group size. Nothing is aligned.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe.errors import CheckpointError

Array = npt.NDArray[Any]

MAGIC = b"QW3W"
START_BYTES = 10
VERSIONS = {b"\0\1": 1, b"\0\2": 2}
# 4-bit values lie two in a byte, so that shapes count bytes.
DTYPES = ("<f4", "<f2", "i1", "u1")
TYPE_NAMES = ("f32", "f16", "i8", "i4 pairs")
F32, F16, I8, I4 = range(4)
MOST_NAME_BYTES = 1 << 10
MOST_DIMENSIONS = 4
MOST_RECORDS = 1 << 20  # Qwen3-235B with zero points has 110,000
RECOPY = "copy the file again"


class DamagedError(ValueError):
    """A length or number that the file cannot have; the text says which."""


@dataclass(frozen=True)
class Record:
    """One array of a file: an index into `DTYPES`, its shape as stored, its mapped data, and v2's group size."""

    dtype: int
    shape: tuple[int, ...]
    data: Array  # of `shape`, read-only, aligned to nothing
    group_size: int | None  # None in v1, which does not tell


class Qw3wFile:
    """A QW3W file, mapped; names, shapes and lengths are checked, no weight is read.

    Attributes:
        version: 1 or 2.
        records: Everything in the file, by name.

    Raises:
        CheckpointError: The file is truncated, damaged, or of another version.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and find its records."""
        self.path = path
        try:
            with path.open("rb") as stream:
                start = stream.read(START_BYTES)
                self.version = version_of(start)
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._digest = hashlib.sha256(start)
            self.records = self._find_records()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
        except DamagedError as error:
            raise CheckpointError(f"{path}: expected a QW3W file, but it is damaged: {error}; {RECOPY}") from None

    @property
    def file_bytes(self) -> int:
        """The size of the file in bytes."""
        return len(self._map)

    def fingerprint(self, samples: int, sample_bytes: int) -> str:
        """A SHA-256 (hex) of what describes the records and of that many pieces of the file."""
        digest = self._digest.copy()
        for sample in range(samples):
            first = max(0, (self.file_bytes - sample_bytes) * sample // (samples - 1))
            digest.update(self._map[first : first + sample_bytes])
        return digest.hexdigest()

    def _find_records(self) -> dict[str, Record]:
        records: dict[str, Record] = {}
        position = START_BYTES
        while position < len(self._map):
            if len(records) == MOST_RECORDS:
                raise DamagedError(f"it has more than {MOST_RECORDS} tensors")
            name, record, position = self._record(position)
            if name in records:
                raise DamagedError(f"it has {name} twice")
            records[name] = record
            self._digest.update(f"\n{name} {record.dtype} {record.shape} {record.group_size}".encode())
        return records

    def _record(self, position: int) -> tuple[str, Record, int]:
        """One record and where the next one begins."""
        first = position
        (name_bytes,), position = self._numbers(position, 1)
        if not 0 < name_bytes <= MOST_NAME_BYTES:
            raise DamagedError(f"at byte {first} a name of {name_bytes} bytes begins")
        text, position = self._bytes(position, name_bytes)
        try:
            name = text.decode()
        except UnicodeDecodeError:
            raise DamagedError(f"the name at byte {first} is no UTF-8 text") from None
        if not name.isprintable():
            raise DamagedError(f"the name at byte {first} is {name[:40]!r}")
        (dtype, dimensions), position = self._numbers(position, 2)
        if dtype >= len(DTYPES) or not 0 < dimensions <= MOST_DIMENSIONS:
            raise DamagedError(f"{name} has dtype {dtype} and {dimensions} dimensions")
        shape, position = self._numbers(position, dimensions)
        if 0 in shape:
            raise DamagedError(f"{name} has shape {list(shape)}")
        count, kind = math.prod(shape), np.dtype(DTYPES[dtype])
        end = position + count * kind.itemsize
        if end > len(self._map):
            raise DamagedError(f"{name} ends at byte {end}, but the file has {len(self._map)} bytes (truncated?)")
        data = np.frombuffer(self._map, kind, count, position).reshape(shape)
        if self.version == 1:
            return name, Record(dtype, shape, data, None), end
        (group_size,), position = self._numbers(end, 1)
        return name, Record(dtype, shape, data, group_size), position

    def _numbers(self, position: int, count: int) -> tuple[tuple[int, ...], int]:
        raw, end = self._bytes(position, 4 * count)
        return struct.unpack(f"<{count}I", raw), end

    def _bytes(self, position: int, count: int) -> tuple[bytes, int]:
        end = position + count
        if end > len(self._map):
            raise DamagedError(f"something ends at byte {end}, but the file has {len(self._map)} bytes (truncated?)")
        return self._map[position:end], end


def version_of(start: bytes) -> int:
    """The version that the first bytes of a file tell; raises DamagedError if it is none."""
    if len(start) < START_BYTES:
        raise DamagedError(f"it has {len(start)} bytes, too few for a header")
    version = VERSIONS.get(start[4:6])
    if start[:4] != MAGIC or version is None:
        raise DamagedError(f"it begins with {start[:6]!r}, expected {MAGIC + bytes([0, 1])!r} or version 2")
    return version
