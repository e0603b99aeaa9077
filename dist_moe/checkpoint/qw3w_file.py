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
    """One array of a file.

    Attributes:
        dtype: An index into `DTYPES`.
        shape: As stored.
        group_size: As v2 says it; None in v1, which does not tell.
        file: Where it lies.
        first_byte: Of its data there.
    """

    dtype: int
    shape: tuple[int, ...]
    group_size: int | None
    file: Qw3wFile
    first_byte: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize

    @property
    def data(self) -> Array:
        """Its mapped data, of `shape`, read-only, aligned to nothing."""
        count = math.prod(self.shape)
        return np.frombuffer(self.file.mapped(), DTYPES[self.dtype], count, self.first_byte).reshape(self.shape)


class Qw3wFile:
    """A QW3W file, mapped; names, shapes and lengths are checked, no weight is read.

    Attributes:
        version: 1 or 2.
        file_bytes: The size of the file in bytes.
        records: Everything in the file, by name.

    Raises:
        CheckpointError: The file is truncated, damaged, or of another version.
    """

    def __init__(self, path: Path, *, keep_mapped: bool = True) -> None:
        """Map the file and find its records.

        Args:
            path: The file.
            keep_mapped: A mapping takes a file descriptor; without it, data is mapped anew whenever it is read.
        """
        self.path = path
        self._kept: mmap.mmap | None = None
        try:
            with path.open("rb") as stream:
                start = stream.read(START_BYTES)
            self.version = version_of(start)
            kept = self._kept = self.mapped()
            self.file_bytes = len(kept)
            self._digest = hashlib.sha256(start)
            self.records = self._find_records(kept)
        except OSError as error:
            raise _unreadable(path, error) from error
        except DamagedError as error:
            raise CheckpointError(f"{path}: expected a QW3W file, but it is damaged: {error}; {RECOPY}") from None
        if not keep_mapped:
            self._kept = None

    def mapped(self) -> mmap.mmap:
        """The mapped file; CheckpointError if it cannot be read any more, or has become shorter."""
        if self._kept is not None:
            return self._kept
        try:
            with self.path.open("rb") as stream:
                return mmap.mmap(stream.fileno(), getattr(self, "file_bytes", 0), access=mmap.ACCESS_READ)
        except ValueError:
            raise CheckpointError(f"{self.path}: is shorter than it was when it was opened; {RECOPY}") from None
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def fingerprint(self, samples: int, sample_bytes: int) -> str:
        """A SHA-256 (hex) of what describes the records and of that many pieces of the file."""
        digest, data = self._digest.copy(), self.mapped()
        for sample in range(samples):
            first = max(0, (self.file_bytes - sample_bytes) * sample // max(1, samples - 1))
            digest.update(data[first : first + sample_bytes])
        return digest.hexdigest()

    def _find_records(self, data: mmap.mmap) -> dict[str, Record]:
        records: dict[str, Record] = {}
        position = START_BYTES
        while position < len(data):
            if len(records) == MOST_RECORDS:
                raise DamagedError(f"it has more than {MOST_RECORDS} tensors")
            name, record, position = self._record(data, position)
            if name in records:
                raise DamagedError(f"it has {name} twice")
            records[name] = record
            self._digest.update(f"\n{name} {record.dtype} {record.shape} {record.group_size}".encode())
        return records

    def _record(self, data: mmap.mmap, position: int) -> tuple[str, Record, int]:
        """One record and where the next one begins."""
        first = position
        (name_bytes,), position = _numbers(data, position, 1)
        if not 0 < name_bytes <= MOST_NAME_BYTES:
            raise DamagedError(f"at byte {first} a name of {name_bytes} bytes begins")
        text, position = _bytes(data, position, name_bytes)
        try:
            name = text.decode()
        except UnicodeDecodeError:
            raise DamagedError(f"the name at byte {first} is no UTF-8 text") from None
        if not name.isprintable():
            raise DamagedError(f"the name at byte {first} is {name[:40]!r}")
        (dtype, dimensions), position = _numbers(data, position, 2)
        if dtype >= len(DTYPES) or not 0 < dimensions <= MOST_DIMENSIONS:
            raise DamagedError(f"{name} has dtype {dtype} and {dimensions} dimensions")
        shape, position = _numbers(data, position, dimensions)
        if 0 in shape:
            raise DamagedError(f"{name} has shape {list(shape)}")
        count, kind = math.prod(shape), np.dtype(DTYPES[dtype])
        end = position + count * kind.itemsize
        if end > len(data):
            raise DamagedError(f"{name} ends at byte {end}, but the file has {len(data)} bytes (truncated?)")
        if self.version == 1:
            return name, Record(dtype, shape, None, self, position), end
        first_byte = position
        (group_size,), position = _numbers(data, end, 1)
        return name, Record(dtype, shape, group_size, self, first_byte), position


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions")


def _numbers(data: mmap.mmap, position: int, count: int) -> tuple[tuple[int, ...], int]:
    raw, end = _bytes(data, position, 4 * count)
    return struct.unpack(f"<{count}I", raw), end


def _bytes(data: mmap.mmap, position: int, count: int) -> tuple[bytes, int]:
    end = position + count
    if end > len(data):
        raise DamagedError(f"something ends at byte {end}, but the file has {len(data)} bytes (truncated?)")
    return data[position:end], end


def version_of(start: bytes) -> int:
    """The version that the first bytes of a file tell; raises DamagedError if it is none."""
    if len(start) < START_BYTES:
        raise DamagedError(f"it has {len(start)} bytes, too few for a header")
    version = VERSIONS.get(start[4:6])
    if start[:4] != MAGIC or version is None:
        raise DamagedError(f"it begins with {start[:6]!r}, expected {MAGIC + bytes([0, 1])!r} or version 2")
    return version
