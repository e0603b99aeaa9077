"""The only importer of gguf: a GGUF file's metadata and mapped tensors, with every length checked before it is used.

The library's reader believes each count (a damaged one makes it loop for hours) and makes an array of every element
(Qwen3's vocabulary: 6 s and 470 MB); the subclass here bounds its reads and takes arrays whole.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.quants import dequantize

from dist_moe.errors import CheckpointError

Array = npt.NDArray[Any]

VERSIONS = (2, 3)
START = struct.Struct("<4sIQQ")  # magic, version, tensors, metadata entries
MOST_ENTRIES = 1 << 16
MOST_TENSORS = 1 << 20
MOST_ITEMS = 1 << 22  # of one array; Qwen3 has 151,936 tokens
MOST_HEADER_BYTES = 1 << 28
MOST_DIMENSIONS = 4
BLOCK = 32  # weights of a Q4_0 or Q8_0 block
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18}
PIECE = 1 << 16  # weights that are made f32 at once: larger pieces leave the processor's caches
RECOPY = "copy or download the file again"


class DamagedError(ValueError):
    """A length, count or offset that the file cannot have; the text says which."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: GGML's name of its type, its shape with rows last but one, and its mapped data.

    Data is float32, float16 or uint8; uint8 holds BF16 as two bytes a value and quantized rows as blocks of bytes.
    """

    type: str
    shape: tuple[int, ...]
    data: Array


class GgufFile:
    """A GGUF file, mapped; its metadata is read, its tensors are not.

    Raises:
        CheckpointError: The file is truncated, damaged, or of another version or byte order.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and read its metadata."""
        self.path = path
        try:
            check_start(path)
            with np.errstate(all="ignore"):
                reader = BoundedReader(path)
            self.metadata: dict[str, Any] = {
                name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")
            }
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
        except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
            reason = error.args[0] if error.args else type(error).__name__
            raise CheckpointError(f"{path}: expected a GGUF file, but it is damaged: {reason}; {RECOPY}") from error
        self.tensors = {
            tensor.name: GgufTensor(
                tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape)), tensor.data
            )
            for tensor in reader.tensors
        }
        self._bytes: npt.NDArray[np.uint8] = reader.data
        self.header_bytes = int(reader.data_offset)

    @property
    def file_bytes(self) -> int:
        """The size of the file in bytes."""
        return len(self._bytes)

    def bytes_at(self, first_byte: int, count: int) -> bytes:
        """Up to `count` bytes of the file from `first_byte` (or its start, if that is negative)."""
        first_byte = max(first_byte, 0)
        return self._bytes[first_byte : first_byte + count].tobytes()


def block_of(type_name: str) -> tuple[int, int]:
    """Weights of one block of a type, and the elements of `GgufTensor.data` that hold it."""
    if type_name in ("F32", "F16"):
        return 1, 1
    weights, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return int(weights), int(block_bytes)


def values_of(data: Array, type_name: str) -> npt.NDArray[np.float32]:
    """A fresh C-contiguous float32 array of a slice of whole blocks of a tensor's data, every value exact."""
    kind, (weights, elements) = GGMLQuantizationType[type_name], block_of(type_name)
    values = np.empty((*data.shape[:-1], data.shape[-1] // elements * weights), np.float32)
    if values.ndim == 1:
        data, flat = data[None], values[None]
    else:
        flat = values
    step = max(1, PIECE // max(1, flat.shape[-1]))
    for first in range(0, len(flat), step):
        rows = slice(first, first + step)
        with np.errstate(all="ignore"):
            flat[rows] = dequantize(np.ascontiguousarray(data[rows]), kind)
    return values


def check_start(path: Path) -> None:
    """Raise DamagedError unless the first bytes promise a file that can be read."""
    with path.open("rb") as stream:
        start = stream.read(START.size)
    if len(start) < START.size:
        raise DamagedError(f"it has {len(start)} bytes, too few for a header")
    magic, version, tensors, entries = START.unpack(start)
    if magic != b"GGUF":
        raise DamagedError(f"it begins with {magic!r}, not with GGUF")
    if version & 0xFFFF == 0:
        raise DamagedError("its numbers are big-endian, which dist-moe does not read")
    if version not in VERSIONS:
        raise DamagedError(f"it has version {version}, expected 2 or 3")
    if tensors > MOST_TENSORS or entries > MOST_ENTRIES:
        raise DamagedError(f"it claims {tensors} tensors and {entries} metadata entries")


class BoundedReader(GGUFReader):
    """The library's reader with every read inside the file, and headers of a sane size."""

    data: Array
    limit = 0  # bytes; nothing is read beyond

    def _get(
        self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: str | None = None
    ) -> npt.NDArray[Any]:
        if type(self.data) is not np.ndarray:
            self.data = np.asarray(self.data)  # slices of a memmap cost ten times as much
            self.limit = min(len(self.data), MOST_HEADER_BYTES)
        first, end = int(offset), int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > self.limit:
            raise DamagedError(f"something ends at byte {end}, but {self.extent()}")
        return self.data[first:end].view(dtype)

    def extent(self) -> str:
        """How far reading may go, in words."""
        if self.limit < len(self.data):
            return f"no header has more than {self.limit} bytes"
        return f"the file has {self.limit} bytes (truncated?)"

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Array], list[int], list[Any]]:
        if int(raw_type) != GGUFValueType.ARRAY:
            parts: tuple[int, list[Array], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return parts
        item = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        if item == GGUFValueType.ARRAY or count > MOST_ITEMS:
            raise DamagedError(f"its metadata has an array of {count} times {item.name}")
        first = orig_offs + 12
        if item == GGUFValueType.STRING:
            texts = self.strings(first, count)
            end = first + sum(8 + len(text) for text in texts)
            return end - orig_offs, texts, list(range(count)), [GGUFValueType.ARRAY, item]
        values = self._get(first, self.gguf_scalar_to_np[item], count)
        return 12 + values.nbytes, [values], [0], [GGUFValueType.ARRAY, item]

    def strings(self, first: int, count: int) -> list[Array]:
        """`count` strings from byte `first` on, as uint8 views."""
        texts: list[Array] = []
        for _ in range(count):
            if first + 8 > self.limit:
                raise DamagedError(f"a string begins at byte {first}, but {self.extent()}")
            (length,) = struct.unpack_from("<Q", self.data.data, first)
            first += 8 + length
            if first > self.limit:
                raise DamagedError(f"a string ends at byte {first}, but {self.extent()}")
            texts.append(self.data[first - length : first])
        return texts

    def _build_tensors(self, start_offs: int, fields: Sequence[Any]) -> None:
        self.limit = len(self.data)
        for field in fields:
            name, sizes, kind = bytes(field.parts[1]).decode(), field.parts[3].tolist(), int(field.parts[4][0])
            if len(sizes) > MOST_DIMENSIONS or not all(0 < size < 2**40 for size in sizes):
                raise DamagedError(f"tensor {name} has dimensions {sizes[:8]}")
            if kind not in GGMLQuantizationType.__members__.values():
                raise DamagedError(f"tensor {name} has type {kind}, which this version of the gguf package lacks")
        super()._build_tensors(start_offs, fields)
