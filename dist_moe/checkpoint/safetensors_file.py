"""The only importer of safetensors: headers validated by the library, tensors as zero-copy views of the mapped file.

The library's NumPy side has no BF16 and copies, so offsets are taken from the header. Written files start every
tensor on a 64-byte boundary; the format allows no gaps between tensors, so padding is a tensor too (hidden here).
"""

from __future__ import annotations

import json
import math
import mmap
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from dist_moe import files
from dist_moe.errors import CheckpointError
from dist_moe.huge_pages import ask_for_huge_pages

# BF16 and 8-bit floats have no NumPy type: their bits are given.
VIEW_TYPES: dict[str, str] = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "BF16": "<u2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}
LENGTH_BYTES = 8
LARGEST_HEADER = 100_000_000  # the library's own limit
PADDING = "__padding_"
RECOPY = "copy or download the file again"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its safetensors dtype, shape, and bytes counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    first_byte: int
    end_byte: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.end_byte - self.first_byte


class SafetensorsFile:
    """A validated, memory-mapped safetensors file; nothing is read before it is used.

    Raises:
        CheckpointError: If the file is missing, truncated or not a valid safetensors file.
    """

    def __init__(self, path: Path) -> None:
        """Validates the header through the library and maps the file."""
        self.path = path
        try:
            with safe_open(path, framework="numpy"):
                pass
            with path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            ask_for_huge_pages(self._map)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(diagnosis(path, error)) from error
        self.header = header_of(self._map)
        self.metadata, self._entries = parse_header(self.header)
        strange = next((name for name in self._entries if not name.isprintable()), None)
        if strange is not None:  # names stand in sentences
            raise CheckpointError(
                f"{path}: expected a safetensors file, but a tensor is called {strange[:80]!r}; {RECOPY}"
            )
        self._padding = sum(entry.nbytes for name, entry in self._entries.items() if name.startswith(PADDING))

    def names(self) -> list[str]:
        """The tensors' names in the order of the file's header, without padding."""
        return [name for name in self._entries if not name.startswith(PADDING)]

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and place of a tensor.

        Raises:
            CheckpointError: If the file has no such tensor.
        """
        if name not in self._entries:
            raise CheckpointError(f"{self.path}: has no tensor {name} (it has {len(self.names())} others); {RECOPY}")
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.entry(name).shape

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as safetensors spells it, such as "BF16"."""
        return self.entry(name).dtype

    def raw(self, name: str) -> npt.NDArray[np.generic]:
        """A read-only view of a tensor's values in the mapped file; BF16 as uint16, 8-bit floats as uint8.

        The view keeps the mapping alive. It is aligned as the file is: ours to 64 bytes, others to none.

        Raises:
            CheckpointError: If the file has no such tensor, or NumPy no way to show its dtype.
        """
        entry = self.entry(name)
        if entry.dtype not in VIEW_TYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name} has dtype {entry.dtype}, expected one of {', '.join(VIEW_TYPES)};"
                " use the bf16 release of the model"
            )
        flat = np.frombuffer(self._map, VIEW_TYPES[entry.dtype], math.prod(entry.shape), entry.first_byte)
        return flat.reshape(entry.shape)

    def bytes_at(self, first_byte: int, count: int) -> bytes:
        """Up to `count` bytes of the file from `first_byte` (or its start, if that is negative)."""
        first_byte = max(first_byte, 0)
        return self._map[first_byte : first_byte + count]

    @property
    def address(self) -> int:
        """Where the file's first byte is mapped."""
        return int(np.frombuffer(self._map, np.uint8, 1).ctypes.data)

    def when_unmapped(self, action: Callable[[], object]) -> None:
        """Call `action` when neither this object nor any view needs the mapping any more, just before it goes."""
        weakref.finalize(self._map, action).atexit = False

    @property
    def file_bytes(self) -> int:
        """The size of the file in bytes."""
        return len(self._map)

    @property
    def tensor_bytes(self) -> int:
        """The size of all tensors in bytes, padding left out."""
        return sum(entry.nbytes for entry in self._entries.values()) - self._padding


def header_of(data: mmap.mmap | bytes) -> bytes:
    """The JSON header at the start of a file."""
    return data[LENGTH_BYTES : LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")]


def parse_header(header: bytes) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """The metadata and the tensors of a valid header."""
    content = json.loads(header)
    metadata: dict[str, str] = content.pop("__metadata__", None) or {}
    start = LENGTH_BYTES + len(header)
    entries = {
        name: TensorEntry(item["dtype"], tuple(item["shape"]), *(start + offset for offset in item["data_offsets"]))
        for name, item in content.items()
    }
    return metadata, entries


def diagnosis(path: Path, error: Exception) -> str:
    """One sentence on why a file could not be opened, with expected and actual bytes if its size is wrong."""
    if not files.is_file(path):
        return f"{path}: expected a safetensors file, but there is none; {RECOPY}"
    actual = path.stat().st_size
    try:
        expected = expected_bytes(path)
    except OSError as reason:
        return f"{path}: cannot be read ({reason.strerror}); check its permissions"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{path}: expected a safetensors file, but its header is damaged ({error}); {RECOPY}"
    if actual < expected:
        return f"{path}: truncated: expected at least {expected} bytes, actual {actual}; {RECOPY}"
    if actual > expected:
        return f"{path}: expected {expected} bytes, actual {actual}; {RECOPY}"
    return f"{path}: expected a safetensors file, but the library refuses it ({error}); {RECOPY}"


def expected_bytes(path: Path) -> int:
    """The bytes that a file needs as far as it can be read: its length field, then its header, then its tensors.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: If the header makes no sense.
    """
    with path.open("rb") as stream:
        prefix = stream.read(LENGTH_BYTES)
        if len(prefix) < LENGTH_BYTES:
            return LENGTH_BYTES
        length = int.from_bytes(prefix, "little")
        if length > LARGEST_HEADER:
            raise ValueError(length)
        header = stream.read(length)
    if len(header) < length:
        return LENGTH_BYTES + length
    return max((entry.end_byte for entry in parse_header(header)[1].values()), default=LENGTH_BYTES + length)


@dataclass(frozen=True)
class FileLayout:
    """A file that is about to be written: its first bytes, and where each tensor's bytes go."""

    header: bytes  # length field, JSON and padding: the file up to the first tensor
    first_byte: dict[str, int]  # per tensor, from the start of the file
    file_bytes: int


def file_layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], alignment: int = 64
) -> FileLayout:
    """Lays out a file in which every tensor starts at a multiple of `alignment` bytes.

    Args:
        tensors: Name to (dtype as safetensors spells it, shape), in the order in which they lie in the file.
        metadata: Free texts for the header.
        alignment: Bytes; gaps are filled by U8 tensors named __padding_<n>__, to be written as zeros.

    Returns:
        The layout; the file has `file_bytes` bytes, a multiple of `alignment`.
    """
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets: dict[str, int] = {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        offsets[name] = position
        end = position + math.prod(shape) * np.dtype(VIEW_TYPES[dtype]).itemsize
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = -(-end // alignment) * alignment
        if position > end:
            padding = {"dtype": "U8", "shape": [position - end], "data_offsets": [end, position]}
            content[f"{PADDING}{len(content)}__"] = padding
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % alignment)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    first_byte = {name: len(header) + offset for name, offset in offsets.items()}
    return FileLayout(header, first_byte, len(header) + position)


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], alignment: int = 64
) -> bytes:
    """The first bytes of the file that `file_layout` describes, up to the first tensor."""
    return file_layout(tensors, metadata, alignment).header
