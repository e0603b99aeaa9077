"""A Hugging Face checkpoint as a ModelConfig and named matrices, widened to f32 slice by slice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_moe import files
from dist_moe.checkpoint.hf_config import read_hf_config
from dist_moe.checkpoint.names import GATE_UP, Location, locations, require_counts
from dist_moe.checkpoint.tensor_files import TensorFiles
from dist_moe.errors import CheckpointError
from dist_moe.model_config import ModelConfig

F32 = npt.NDArray[np.float32]
ALL = slice(None)
DTYPES = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
# Buffers that old releases of transformers saved; their values follow from config.json.
KNOWN_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates.json",
    "generation_config.json",
    "config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPARED_ROWS = 4096
SAMPLES, SAMPLE_BYTES = 16, 4096


class Checkpoint:
    """An opened checkpoint: every tensor is known to be there, of the right shape and of a dtype that can be read.

    Logical names: "embedding", "lm_head", "final_norm"; per layer "layers.{l}." and "attention_norm", "mlp_norm",
    "q_norm", "k_norm", "q", "k", "v", "o" (and "q_bias" ... with attention_bias), "router", "experts.{e}.gate",
    ".up", ".down" (a dense MLP is expert 0). Per-expert and fused files give the same arrays.
    """

    def __init__(self, directory: Path, config: ModelConfig, tensors: TensorFiles) -> None:
        """Takes a checked config and the opened files; use `open`."""
        self.path = directory
        self.config = config
        self._tensors = tensors
        shapes = {name: tensors.entry(name).shape for name in tensors.names()}
        require_counts(directory, config, shapes, GATE_UP)
        self._locations = locations(config, tensors)

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Opens and validates a directory; weights are mapped, not read.

        Raises:
            CheckpointError: If anything is missing, damaged, of another shape or dtype, unknown or unsupported.
        """
        if not files.is_directory(directory):
            actual = "a file" if files.exists(directory) else "not there"
            raise CheckpointError(
                f"{directory}: expected a Hugging Face model directory, but it is {actual};"
                " give the directory that holds config.json and model.safetensors"
            )
        config = read_hf_config(directory)
        tensors = TensorFiles(directory)
        if config.tied_embeddings and not is_tied(tensors):
            # transformers does not tie either when the file holds another lm_head: it uses that one.
            config = dataclasses.replace(config, tied_embeddings=False)
        checkpoint = cls(directory, config, tensors)
        checkpoint._check_tensors()
        return checkpoint

    def names(self) -> list[str]:
        """All logical names, in the order of the forward pass."""
        return list(self._locations)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a logical matrix [rows, columns] or vector [n]."""
        place = self._locations[name]
        shape = place.tensor_shape[1:] if place.expert is not None else place.tensor_shape
        return shape if place.rows is None else (place.rows, *shape[1:])

    def preferred_dtype(self) -> str | None:
        """None: a store of it is quantized unless its user wants otherwise."""
        return None

    def blocks(self, name: str, rows: slice, columns: slice) -> None:
        """None: no matrix of such a checkpoint is quantized."""
        return None

    def source_dtype(self, name: str) -> str:
        """The dtype in the file: "bf16", "f16" or "f32"."""
        return DTYPES[self._tensors.entry(self._locations[name].tensor).dtype]

    def raw(self, name: str) -> npt.NDArray[np.generic]:
        """A read-only view of a logical matrix in the mapped file; BF16 as uint16, possibly unaligned."""
        place = self._locations[name]
        values = self._tensors.file(place.tensor).raw(place.tensor)
        if place.expert is not None:
            values = values[place.expert]
        return values if place.rows is None else values[place.first_row : place.first_row + place.rows]

    def stored(self, name: str, rows: slice, columns: slice | None = None) -> npt.NDArray[np.generic] | None:
        """A read-only view of a slice, its rows apart: f32, or bf16 as uint16; None if the file has neither."""
        values = self.raw(name)[rows]
        values = values if columns is None else values[:, columns]
        return values if values.dtype in (np.float32, np.uint16) and values.flags.aligned else None

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> F32:
        """A fresh C-contiguous f32 copy of a slice of a logical matrix or vector, widened exactly.

        Args:
            name: Logical name.
            rows: Rows of a matrix or elements of a vector, all by default.
            columns: Columns of a matrix, all by default; must be absent for a vector.
        """
        values = self.raw(name)[ALL if rows is None else rows]
        return widen(values if columns is None else values[:, columns])

    @property
    def total_bytes(self) -> int:
        """Bytes of the tensors that the model uses, each counted once, as the files store them."""
        used = {place.tensor for place in self._locations.values()}
        return sum(self._tensors.entry(tensor).nbytes for tensor in used)

    def text_files(self) -> dict[str, bytes]:
        """The files that exist among those of tokenizer, chat template and generation, and config.json.

        A store has no folders: `additional_chat_templates/*.jinja` become one JSON object, as `text` reads it.

        Raises:
            CheckpointError: A chat template is not UTF-8.
            UsageError: One of them cannot be read.
        """
        return directory_texts(self.path)

    def fingerprint(self) -> str:
        """A SHA-256 (hex) of config.json, every file's name, size and header, and 16 pages of its tensors.

        Cheap at any size, and the same for a copy elsewhere. It tells apart what people mix up (models, versions,
        fine-tunes); it does not find a changed bit.
        """
        digest = hashlib.sha256(files.read_bytes(self.path / "config.json"))
        for name, file in sorted(self._tensors.files.items()):
            digest.update(f"\n{name} {file.file_bytes} ".encode() + file.header)
            for sample in range(SAMPLES):
                digest.update(file.bytes_at((file.file_bytes - SAMPLE_BYTES) * sample // (SAMPLES - 1), SAMPLE_BYTES))
        return digest.hexdigest()

    def _check_tensors(self) -> None:
        """Raises unless the files hold exactly the tensors of this architecture, apart from known buffers."""
        places = {place.tensor: place for place in self._locations.values()}
        missing = [tensor for tensor in places if tensor not in self._tensors]
        extra = [name for name in self._tensors.names() if name not in places and not KNOWN_BUFFERS.fullmatch(name)]
        if self.config.tied_embeddings and LM_HEAD in extra:
            extra.remove(LM_HEAD)
        scales = [name for name in extra if "weight_scale" in name]
        if scales:
            raise CheckpointError(
                f"{self._tensors.file(scales[0]).path}: has {scales[0]}, the scales of FP8 weights, which dist-moe does"
                " not read; download the bf16 release of the model and let dist-moe quantize it"
            )
        if missing:
            raise CheckpointError(
                f"{self.path}: tensor {missing[0]} is missing ({len(missing)} of {len(places)} are);"
                f" {missing_advice(missing)}"
            )
        if extra:
            raise CheckpointError(
                f"{self._tensors.file(extra[0]).path}: has {extra[0]} ({len(extra)} such), which is no tensor of the"
                f" {self.config.architecture} that config.json describes; check that both belong to the same model"
            )
        for place in places.values():
            self._check_tensor(place)

    def _check_tensor(self, place: Location) -> None:
        entry, path = self._tensors.entry(place.tensor), self._tensors.file(place.tensor).path
        if entry.shape != place.tensor_shape:
            raise CheckpointError(
                f"{path}: tensor {place.tensor} has shape {list(entry.shape)}, but config.json makes it"
                f" {list(place.tensor_shape)}; check that both belong to the same model"
            )
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {place.tensor} has dtype {entry.dtype}, expected {', '.join(DTYPES)};"
                " download the bf16 release of the model and let dist-moe quantize it"
            )


def missing_advice(missing: list[str]) -> str:
    """What to do about missing tensors."""
    if missing == [LM_HEAD]:
        return "config.json does not set tie_word_embeddings, so lm_head must be there: download the checkpoint again"
    return "check that config.json belongs to these weights, and download the checkpoint again"


def is_tied(tensors: TensorFiles) -> bool:
    """Whether lm_head is absent or holds exactly the embedding's values (compared in pieces)."""
    if LM_HEAD not in tensors or EMBEDDING not in tensors:
        return True
    entries = tensors.entry(LM_HEAD), tensors.entry(EMBEDDING)
    if entries[0].shape != entries[1].shape or any(entry.dtype not in DTYPES for entry in entries):
        return True  # the check of the tensors says what is wrong
    head, embedding = (tensors.file(name).raw(name) for name in (LM_HEAD, EMBEDDING))
    pieces = (slice(first, first + COMPARED_ROWS) for first in range(0, len(head), COMPARED_ROWS))
    return all(np.array_equal(widen(head[piece]), widen(embedding[piece])) for piece in pieces)


def widen(values: npt.NDArray[np.generic]) -> F32:
    """A fresh C-contiguous f32 array of f32, f16 or bf16 (uint16 bits) values; every value is kept exactly."""
    if values.dtype == np.uint16:
        bits = np.empty(values.shape, np.uint32)
        np.left_shift(values, np.uint32(16), out=bits, dtype=np.uint32)
        return bits.view(np.float32)
    return np.array(values, np.float32, order="C")


def directory_texts(directory: Path) -> dict[str, bytes]:
    """`Checkpoint.text_files` of a directory; raises as it does."""
    names = [name for name in TEXT_FILES if files.is_file(directory / name)]
    return {**_extra_templates(directory), **{name: files.read_bytes(directory / name) for name in names}}


def _extra_templates(directory: Path) -> dict[str, bytes]:
    sources = {}
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        try:
            sources[path.stem] = files.read_bytes(path).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: cannot be read as text: {error}") from error
    if not sources:
        return {}
    return {"additional_chat_templates.json": (json.dumps(sources, ensure_ascii=False, indent=1) + "\n").encode()}
