"""A GGUF model in one file, or in several as llama-gguf-split and Hugging Face's large repositories have it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_moe import files
from dist_moe.checkpoint.gguf_file import RECOPY, GgufFile, GgufTensor
from dist_moe.checkpoint.gguf_names import PART
from dist_moe.errors import CheckpointError


class GgufParts:
    """All files of a model, mapped.

    Attributes:
        files: They, in order.
        metadata: The first one's, which describes the model.
        tensors: Everybody's.

    Raises:
        CheckpointError: A file is missing, damaged, or belongs to another model, or the path is not the first one's.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and those that it was split from."""
        first = GgufFile(path)
        count = _count(first.metadata)
        self.files = (first,) if count == 1 else (first, *_others(path, first.metadata, count))
        self.metadata: Mapping[str, Any] = first.metadata
        self.tensors: dict[str, GgufTensor] = {}
        for file in self.files:
            twice = next((name for name in file.tensors if name in self.tensors), None)
            if twice is not None:
                raise CheckpointError(f"{file.path}: has tensor {twice}, as an earlier file of the model has; {RECOPY}")
            self.tensors |= file.tensors
        expected = first.metadata.get("split.tensors.count", len(self.tensors))
        if count > 1 and expected != len(self.tensors):
            raise CheckpointError(
                f"{path}: the {count} files of this model have {len(self.tensors)} tensors, expected {expected}; copy "
                "or download all of them again"
            )


def _count(metadata: Mapping[str, Any]) -> int:
    count = metadata.get("split.count", 1)
    return count if isinstance(count, int) and count > 1 else 1


def _others(path: Path, metadata: Mapping[str, Any], count: int) -> list[GgufFile]:
    """The files after the first."""
    part = PART.fullmatch(path.name)
    if part is None or int(part[3]) != count:
        raise CheckpointError(
            f"{path}: is one of {count} files of a split model; join them first: "
            "llama-gguf-split --merge FIRST_FILE.gguf WHOLE.gguf (or give each its name back: "
            f"NAME-00001-of-{count:05}.gguf)"
        )
    number = metadata.get("split.no", 0)
    if number != 0:
        raise CheckpointError(
            f"{path}: is file {number + 1} of the {count} of a model; give the first one, {_sibling(path, 0).name}"
        )
    return [_other(path, index, count) for index in range(1, count)]


def _other(first: Path, index: int, count: int) -> GgufFile:
    path = _sibling(first, index)
    if not files.is_file(path):
        raise CheckpointError(
            f"{path}: is missing: it is file {index + 1} of the {count} that {first.name} begins; put all of them into "
            "one directory"
        )
    file = GgufFile(path)
    found = file.metadata.get("split.no"), file.metadata.get("split.count")
    if found != (index, count):
        raise CheckpointError(
            f"{path}: expected file {index + 1} of {count} (split.no {index}, split.count {count}), but its metadata "
            f"say split.no {found[0]}, split.count {found[1]}; {RECOPY}"
        )
    return file


def _sibling(path: Path, index: int) -> Path:
    part = PART.fullmatch(path.name)
    assert part is not None
    return path.with_name(f"{part[1]}-{index + 1:05}-of-{part[3]}.gguf")
