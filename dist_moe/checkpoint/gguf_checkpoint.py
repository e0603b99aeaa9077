"""A GGUF file as a ModelConfig and named matrices: quantized blocks as they are, or exact f32 slices."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dist_moe.checkpoint.gguf_config import gguf_config
from dist_moe.checkpoint.gguf_file import BLOCK, BLOCK_BYTES, RECOPY, block_of, values_of
from dist_moe.checkpoint.gguf_names import EMBEDDING, EXPERTS, LM_HEAD, gguf_locations
from dist_moe.checkpoint.gguf_parts import GgufParts
from dist_moe.checkpoint.gguf_text import text_files
from dist_moe.checkpoint.names import kind_of_most, require_counts
from dist_moe.checkpoint.reader import SAMPLE_BYTES, SAMPLES
from dist_moe.checkpoint.source import F32, Array, Blocks
from dist_moe.errors import CheckpointError

FLOATS, BLOCKS = ("F32", "F16", "BF16"), ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS")
READABLE = (*FLOATS, *BLOCKS, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
SHOWN = 6  # tensors that one sentence lists
ALL = slice(None)


class GgufCheckpoint:
    """An opened GGUF model: every tensor is known to be there, of the right shape and of a type that can be read.

    Logical names are those of `Checkpoint`.

    Raises:
        CheckpointError: If the file is damaged, of another architecture, incomplete, or has unsupported tensors.
    """

    def __init__(self, path: Path) -> None:
        """Map and check the file, and those that follow it where it is the first of several; weights are not read."""
        self.path = path
        self._file = GgufParts(path)
        tensors = self._file.tensors
        vocabulary = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else 1
        self.config = gguf_config(str(path), self._file.metadata, vocabulary, LM_HEAD not in tensors)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        require_counts(path, self.config, shapes, EXPERTS)
        self._locations = gguf_locations(self.config, tensors)
        self._check_tensors()

    def names(self) -> list[str]:
        """All logical names, in the order of the forward pass."""
        return list(self._locations)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a logical matrix [rows, columns] or vector [n]."""
        place = self._locations[name]
        return place.tensor_shape if place.expert is None else place.tensor_shape[1:]

    def source_dtype(self, name: str) -> str:
        """How the file keeps it: a type of `READABLE` in small letters, such as "q4_0"."""
        return self._type(name).lower()

    def preferred_dtype(self) -> str | None:
        """The dtype of most of the matrices' weights: who made the file chose it."""
        return kind_of_most(self._locations, lambda tensor: self._file.tensors[tensor].type.lower())

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> F32:
        """A fresh C-contiguous f32 copy of a slice of a logical matrix or vector, every value exact."""
        data, type_name = self._data(name)[ALL if rows is None else rows], self._type(name)
        if columns is None:
            return values_of(data, type_name)
        first, stop, _ = columns.indices(self.shape(name)[1])
        width, elements = block_of(type_name)
        first_block, stop_block = first // width, -(-stop // width)
        values = values_of(data[:, first_block * elements : stop_block * elements], type_name)
        return np.ascontiguousarray(values[:, first - first_block * width : stop - first_block * width])

    def blocks(self, name: str, rows: slice, columns: slice) -> Blocks | None:
        """The integers and scales of a slice that begins and ends with whole blocks of a Q4_0 or Q8_0 matrix."""
        block_bytes = BLOCK_BYTES.get(self._type(name))
        first, stop, _ = columns.indices(self.shape(name)[1])
        if block_bytes is None or first % BLOCK or stop % BLOCK:
            return None
        data = self._data(name)[rows]
        bytes_RGb = data.reshape(len(data), -1, block_bytes)[:, first // BLOCK : stop // BLOCK]
        scale_RG = np.ascontiguousarray(bytes_RGb[..., :2]).view(np.float16)[..., 0]
        codes_RG = bytes_RGb[..., 2:]
        return Blocks(4, scale_RG, codes_RG) if block_bytes == 18 else Blocks(8, scale_RG, codes_RG.view(np.int8))

    def text_files(self) -> Mapping[str, bytes]:
        """tokenizer.json and the other small files, made from the metadata; none if it has no tokenizer."""
        return text_files(str(self.path), self._file.metadata)

    def fingerprint(self) -> str:
        """A SHA-256 (hex) of each file's header, size and 16 pages of its tensors; see `Checkpoint.fingerprint`."""
        digest = hashlib.sha256()
        for file in self._file.files:
            digest.update(f"gguf {file.file_bytes} ".encode() + file.bytes_at(0, file.header_bytes))
            for sample in range(SAMPLES):
                digest.update(file.bytes_at((file.file_bytes - SAMPLE_BYTES) * sample // (SAMPLES - 1), SAMPLE_BYTES))
        return digest.hexdigest()

    def _type(self, name: str) -> str:
        return self._file.tensors[self._locations[name].tensor].type

    def _data(self, name: str) -> Array:
        place = self._locations[name]
        data = self._file.tensors[place.tensor].data
        return data if place.expert is None else data[place.expert]

    def _check_tensors(self) -> None:
        """Raise unless the file holds exactly the tensors of its architecture, each in a type that can be read."""
        places, tensors = {place.tensor: place for place in self._locations.values()}, self._file.tensors
        missing = [tensor for tensor in places if tensor not in tensors]
        if missing:
            raise CheckpointError(
                f"{self.path}: tensor {missing[0]} is missing ({len(missing)} of {len(places)} are); {RECOPY}"
            )
        extra = [tensor for tensor in tensors if tensor not in places]
        if extra:
            raise CheckpointError(
                f"{self.path}: has {extra[0]} ({len(extra)} such), which is no tensor of the"
                f" {self.config.architecture} that its metadata describes; get the file from another place"
            )
        for tensor, place in places.items():
            if tensors[tensor].shape != place.tensor_shape:
                raise CheckpointError(
                    f"{self.path}: tensor {tensor} has shape {list(tensors[tensor].shape)}, but the metadata makes it"
                    f" {list(place.tensor_shape)}; {RECOPY}"
                )
        refused = [tensor for tensor in places if tensors[tensor].type not in READABLE]
        if refused:
            raise CheckpointError(self._refusal(refused))

    def _refusal(self, refused: list[str]) -> str:
        tensors = self._file.tensors
        counts = Counter(tensors[tensor].type for tensor in refused)
        listed = ", ".join(f"{tensor} is {tensors[tensor].type}" for tensor in refused[:SHOWN])
        more = f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        return (
            f"{self.path}: {len(refused)} of {len(tensors)} tensors have a type that dist-moe does not read ({kinds}):"
            f" {listed}{more}; expected {', '.join(READABLE)}: get the file in another type, such as"
            " Q4_K_M or Q8_0, or give the Hugging Face directory"
        )
