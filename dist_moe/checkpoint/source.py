"""What the store needs of a model that others wrote, whatever the format of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dist_moe import files
from dist_moe.checkpoint.qw3w_directory import is_qw3w_directory
from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.errors import CheckpointError, EnvironmentMismatch
from dist_moe.model_config import ModelConfig

MAGICS = {b"GGUF": "GGUF", b"QW3W": "QW3W"}
Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Blocks:
    """A slice of a matrix that is quantized in groups of 32 along its rows: R rows, G groups."""

    bits: int  # 4: values -8 ... 7; 8: values -128 ... 127
    scale_RG: npt.NDArray[np.float16]
    # 4 bits: uint8 [R, G, 16], value + 8 of columns i and 16 + i in the halves of byte i. 8 bits: int8 [R, G, 32].
    codes_RG: Array


class Source(Protocol):
    """A model before it is packed; logical names and slices are those of `Checkpoint`."""

    path: Path
    config: ModelConfig

    def names(self) -> list[str]:
        """All logical names, in the order of the forward pass."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a logical matrix [rows, columns] or vector [n]."""

    def source_dtype(self, name: str) -> str:
        """How the file keeps it: "f32", "f16", "bf16", or a GGUF or QW3W type such as "q8_0" or "q4_k"."""

    def preferred_dtype(self) -> str | None:
        """The dtype of most of its matrices' weights if a store should keep that; None if it should quantize them."""

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> F32:
        """A fresh C-contiguous copy of a slice, every value exactly as float32."""

    def blocks(self, name: str, rows: slice, columns: slice) -> Blocks | None:
        """The integers and scales of a slice of a matrix; None if it is not kept as such."""

    def text_files(self) -> Mapping[str, bytes]:
        """The small files that a store keeps beside its weights: tokenizer, templates, generation."""

    def fingerprint(self) -> str:
        """A cheap SHA-256 (hex) that tells models, versions and fine-tunes apart."""


@runtime_checkable
class MappedSource(Protocol):
    """A source whose matrices the kernels may read in the mapped file."""

    def stored(self, name: str, rows: slice, columns: slice | None = None) -> Array | None:
        """A read-only view of a slice, its rows apart: float32, or bf16 as uint16; None if it must be decoded."""


def file_format(path: Path) -> str | None:
    """The format of a model's own file, "GGUF" or "QW3W" (or its directory of such), by the first bytes; else None.

    Raises:
        UsageError: The system does not say what stands there.
        CheckpointError: The file cannot be read.
    """
    if not files.is_file(path):
        return "QW3W" if is_qw3w_directory(path) else None
    try:
        with path.open("rb") as stream:
            return MAGICS.get(stream.read(4))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def open_source(path: Path) -> Source:
    """Open a Hugging Face directory, a GGUF file, or a QW3W file or directory, told apart by what they hold.

    Raises:
        CheckpointError: It is none of them, damaged, or not supported.
        EnvironmentMismatch: The package that reads GGUF files is not installed.
    """
    found = file_format(path)
    if found == "GGUF":
        return open_gguf(path)
    if found == "QW3W":
        from dist_moe.checkpoint.qw3w_checkpoint import Qw3wCheckpoint

        return Qw3wCheckpoint(path)
    if files.is_file(path):
        raise CheckpointError(
            f"{path}: expected a Hugging Face model directory, a GGUF file or a QW3W file, but it is a file that does "
            "not begin with GGUF or QW3W; give the directory that holds config.json, or copy the file again"
        )
    return Checkpoint.open(path)


def open_gguf(path: Path) -> Source:
    """Open a GGUF file; raises as `open_source`."""
    require_gguf(path)
    from dist_moe.checkpoint.gguf_checkpoint import GgufCheckpoint

    return GgufCheckpoint(path)


def require_gguf(path: Path) -> None:
    """Raise EnvironmentMismatch unless the package that reads GGUF files is installed; most users never need it."""
    try:
        import dist_moe.checkpoint.gguf_file  # noqa: F401
    except ImportError as error:
        if error.name != "gguf":
            raise
        raise EnvironmentMismatch(
            f"{path}: reading a GGUF file needs the package gguf: pip install 'dist-moe[gguf]' (or pip install gguf)"
        ) from None
