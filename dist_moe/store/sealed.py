"""Mapped weights with the checksums that were written beside them, and what to call them when they are damaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_moe.checkpoint.safetensors_file import SafetensorsFile
from dist_moe.kernels import MappedFile, MappedTensor
from dist_moe.store.layout import UnitTensor
from dist_moe.store.manifest import Manifest
from dist_moe.store.units import chunks_per_expert, unit_label

_NO_UNITS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Sealed:
    """One unit, or one common tensor, as it is mapped.

    Attributes:
        path: The file.
        tensor: The tensor in it.
        unit: The unit in words, "" for a tensor without units.
        data: uint8, read-only.
        checksum: What xxh3 was when the file was written.
        copied: Whether `data` is a rank's own copy of it.
    """

    path: Path
    tensor: str
    unit: str
    data: npt.NDArray[np.uint8]
    checksum: int
    copied: bool = False

    def damage(self, actual: int) -> str:
        """A sentence for bytes that have another checksum, without what is to be done."""
        place = "this rank's copy of " if self.copied else ""
        return f"{place}{self.path}: {damage_text(self.tensor, self.unit, actual, self.checksum)}"


def damage_text(tensor: str, unit: str, actual: int, expected: int) -> str:
    """What is damaged, for a message that began with the file's name; `unit` may be ""."""
    unit = f", {unit}" if unit else ""
    return f"tensor {tensor!r}{unit} is damaged: its bytes have checksum {actual:016x}, the file says {expected:016x}"


def name_mapped(weights: SafetensorsFile, manifest: Manifest, tensors: Sequence[UnitTensor]) -> None:
    """Let a SIGBUS name the units of a mapped file, as long as it is mapped.

    Args:
        weights: The file.
        manifest: Its store's.
        tensors: Those of its tensors that hold units.
    """
    units = {tensor.spec.name: tensor for tensor in tensors}
    named = [_mapped(weights, name, manifest, units.get(name)) for name in weights.names()]
    known = MappedFile(str(weights.path), weights.address, weights.file_bytes, named)
    weights.when_unmapped(known.remove)


def _mapped(weights: SafetensorsFile, name: str, manifest: Manifest, tensor: UnitTensor | None) -> MappedTensor:
    entry = weights.entry(name)
    address = weights.address + entry.first_byte
    if tensor is None:
        return MappedTensor(address, entry.nbytes, f"tensor '{name}'", _NO_UNITS)
    chunked = tensor.kind == "chunk"
    per_expert = chunks_per_expert(manifest.config, manifest.group_size, tensor.layer) if chunked else 1
    label = unit_label(tensor.kind, tensor.layer)
    return MappedTensor(address, entry.nbytes, label, np.ascontiguousarray(tensor.indices), per_expert)
