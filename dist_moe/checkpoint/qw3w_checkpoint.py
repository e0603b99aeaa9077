"""A QW3W file or directory with its config.json as a ModelConfig and named matrices, each value as moe.cc meant it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dist_moe import files
from dist_moe.checkpoint.hf_config import read_hf_config
from dist_moe.checkpoint.names import GATE_UP, Location, kind_of_most, locations, require_counts
from dist_moe.checkpoint.qw3w_directory import Qw3wDirectory
from dist_moe.checkpoint.qw3w_file import RECOPY, DamagedError, Qw3wFile
from dist_moe.checkpoint.qw3w_matrix import ALL, Matrix, matrices
from dist_moe.checkpoint.reader import (
    COMPARED_ROWS,
    EMBEDDING,
    KNOWN_BUFFERS,
    LM_HEAD,
    SAMPLE_BYTES,
    SAMPLES,
    directory_texts,
)
from dist_moe.checkpoint.source import F32, Blocks
from dist_moe.errors import CheckpointError

CONFIG = "config.json"


class Qw3wCheckpoint:
    """An opened QW3W model: every tensor is known to be there, whole and of the right shape.

    The file holds weights alone: config.json, the tokenizer and the other small files are those of its directory.
    Logical names are those of `Checkpoint`.

    Raises:
        CheckpointError: The file is damaged or incomplete, or there is no config.json of the same model beside it.
    """

    def __init__(self, path: Path) -> None:
        """Check the file, or a directory of files; weights are not read."""
        self.path = path
        is_directory = files.is_directory(path)
        self._directory = path if is_directory else path.parent
        self._file = Qw3wDirectory(path) if is_directory else Qw3wFile(path)
        try:
            self._tensors = matrices(self._file.records)
        except DamagedError as error:
            raise CheckpointError(f"{path}: expected a QW3W file, but it is damaged: {error}; {RECOPY}") from None
        if not files.is_file(self._directory / CONFIG):
            raise CheckpointError(
                f"{path}: a QW3W file holds weights alone, and there is no {CONFIG} beside it: copy {CONFIG} and "
                f"tokenizer.json of the model's Hugging Face directory to {self._directory}"
            )
        self.config = read_hf_config(self._directory)
        if self.config.tied_embeddings and not self._is_tied():
            # As for a Hugging Face directory: a file that holds another lm_head means it.
            self.config = dataclasses.replace(self.config, tied_embeddings=False)
        shapes = {name: matrix.shown_shape() for name, matrix in self._tensors.items()}
        require_counts(path, self.config, shapes, GATE_UP)
        self._locations = locations(self.config, self._tensors)
        self._check_tensors()

    def names(self) -> list[str]:
        """All logical names, in the order of the forward pass."""
        return list(self._locations)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a logical matrix [rows, columns] or vector [n]."""
        place = self._locations[name]
        shape = place.tensor_shape if place.expert is None else place.tensor_shape[1:]
        return shape if place.rows is None else (place.rows, *shape[1:])

    def source_dtype(self, name: str) -> str:
        """How the file keeps it: a kind of `Matrix`."""
        return self._tensors[self._locations[name].tensor].kind

    def preferred_dtype(self) -> str | None:
        """The kind of most of the matrices' weights; None if they are not quantized."""
        kind = kind_of_most(self._locations, lambda tensor: self._tensors[tensor].kind)
        return kind if kind.startswith("qw3w_") else None

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> F32:
        """A fresh C-contiguous f32 copy of a slice of a logical matrix or vector, every value exact."""
        place, rows = self._locations[name], ALL if rows is None else rows
        matrix = self._tensors[place.tensor]
        if matrix.scales is not None:
            return matrix.read(place.tensor_shape, rows, ALL if columns is None else columns)
        values = matrix.values.data if place.expert is None else matrix.values.data[place.expert]
        if place.rows is not None:
            values = values[place.first_row : place.first_row + place.rows]
        values = values[rows]
        return np.array(values if columns is None else values[:, columns], np.float32, order="C")

    def blocks(self, name: str, rows: slice, columns: slice) -> Blocks | None:
        """None: its scales are f32, which no store keeps."""
        return None

    def text_files(self) -> Mapping[str, bytes]:
        """The small files of its directory, as `Checkpoint.text_files`."""
        return directory_texts(self._directory)

    def fingerprint(self) -> str:
        """A SHA-256 (hex) of config.json, the file's names, shapes and size, and 16 pages of it."""
        digest = hashlib.sha256(files.read_bytes(self._directory / CONFIG))
        digest.update(f"\nqw3w {self._file.file_bytes} {self._file.fingerprint(SAMPLES, SAMPLE_BYTES)}".encode())
        return digest.hexdigest()

    def _is_tied(self) -> bool:
        """Whether lm_head is absent or the embedding's twin."""
        head, embedding = self._tensors.get(LM_HEAD), self._tensors.get(EMBEDDING)
        if head is None or embedding is None or head.kind != embedding.kind or head.scales is not None:
            return head is None
        pieces = (slice(first, first + COMPARED_ROWS) for first in range(0, len(head.values.data), COMPARED_ROWS))
        return all(np.array_equal(head.values.data[piece], embedding.values.data[piece]) for piece in pieces)

    def _check_tensors(self) -> None:
        """Raise unless the file holds exactly the tensors of this architecture, apart from known buffers."""
        places = {place.tensor: place for place in self._locations.values()}
        missing = [tensor for tensor in places if tensor not in self._tensors]
        if missing:
            raise CheckpointError(
                f"{self.path}: tensor {missing[0]} is missing ({len(missing)} of {len(places)} are); export the whole "
                f"model (--all), and check that {CONFIG} belongs to it"
            )
        extra = [name for name in self._tensors if name not in places and not KNOWN_BUFFERS.fullmatch(name)]
        if self.config.tied_embeddings and LM_HEAD in extra:
            extra.remove(LM_HEAD)
        if extra:
            raise CheckpointError(
                f"{self.path}: has {extra[0]} ({len(extra)} such), which is no tensor of the "
                f"{self.config.architecture} that {CONFIG} beside it describes; check that both belong to one model"
            )
        for tensor, place in places.items():
            self._check_tensor(tensor, place, self._tensors[tensor])

    def _check_tensor(self, tensor: str, place: Location, matrix: Matrix) -> None:
        if not matrix.fits(place.tensor_shape):
            raise CheckpointError(
                f"{self.path}: tensor {tensor} has shape {list(matrix.shown_shape())}, but {CONFIG} beside it makes it "
                f"{list(place.tensor_shape)}; check that both belong to one model"
            )
        if matrix.scales is not None:
            try:
                matrix.group(place.tensor_shape)
            except DamagedError as error:
                raise CheckpointError(f"{self.path}: tensor {tensor} {error}; {RECOPY}") from None
