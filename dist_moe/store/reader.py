"""The mapped store: units and common tensors as views of the files, nothing copied, nothing repacked."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dist_moe import files
from dist_moe.checkpoint.safetensors_file import SafetensorsFile
from dist_moe.errors import StoreError
from dist_moe.model_config import ModelConfig
from dist_moe.store.layout import (
    CHECKSUM_SUFFIX,
    UnitTensor,
    shard_command,
    shard_number,
    source_note,
    unit_tensors,
    weight_files,
)
from dist_moe.store.lock import mark_used
from dist_moe.store.manifest import COMMON_NAME, MANIFEST_NAME, PROGRESS_NAME, Manifest, read_manifest
from dist_moe.store.placement import indices_of, shard_name
from dist_moe.store.rope_scaling import RopeScaling, scale_config
from dist_moe.store.sealed import Sealed
from dist_moe.store.units import UnitKind, describe_unit, tensor_name, unit_count
from dist_moe.store.verify import check_file, check_header, open_weights

FULL_CHECK_BYTES = 64 << 20  # smaller files are checked whole at every open: xxh3 runs at several GB/s

Check = Literal["fast", "full"]
Rows = npt.NDArray[np.uint8]  # [units, bytes of one unit]


class _Held(NamedTuple):
    """A tensor of units in one of the files that are here."""

    file: str
    tensor: UnitTensor
    rows: Rows

    def row_of(self, index: int) -> int | None:
        """The row that holds a unit, or None."""
        row = int(self.tensor.indices.searchsorted(index))
        return row if row < len(self.rows) and self.tensor.indices[row] == index else None


class Store:
    """An open store. Its mappings live as long as it or any view of them does.

    Attributes:
        directory: Where it is.
        manifest: What it holds.
        present_files: Names of the weight files that are here.
        present_paths: Where they are.
        missing_files: Names of the shards that are not.
    """

    def __init__(self, directory: Path, manifest: Manifest, files: dict[str, SafetensorsFile]) -> None:
        """Use `open`, which checks the files first."""
        self.directory = directory
        self.manifest = manifest
        self.present_files = tuple(files)
        self.present_paths = tuple(directory / name for name in files)
        self.missing_files = tuple(name for name in weight_files(manifest) if name not in files)
        self._files = files
        mark = mark_used(directory / MANIFEST_NAME)
        if mark is not None:
            weakref.finalize(self, os.close, mark)
        self._tensors: dict[str, list[_Held]] = {}  # by kind and layer, of whatever formats
        self._addresses: dict[str, npt.NDArray[np.uint64]] = {}
        for name, weights in files.items():
            if name == COMMON_NAME:
                continue
            for tensor in unit_tensors(manifest, shard_number(manifest, name)):
                rows = weights.raw(tensor.spec.name).view(np.uint8)
                self._tensors.setdefault(tensor_name(tensor.kind, tensor.layer), []).append(_Held(name, tensor, rows))

    @classmethod
    def open(
        cls,
        directory: Path | str,
        check: Check = "fast",
        rope_scaling: RopeScaling | None = None,
        with_text: bool = True,
    ) -> Store:
        """Map a store; shards that are not on this machine may be absent until `require` asks for their units.

        Args:
            directory: The store.
            check: `fast` compares sizes, headers and the checksums of files below 64 MB; `full` those of all files.
            rope_scaling: Run the model with other rotary frequencies and a longer context.
            with_text: Whether the small files, such as the tokenizer's, must be there.

        Raises:
            UsageError: `rope_scaling` makes no sense for this model.
            StoreError: This is not a store, or it is incomplete, damaged or of another version.
        """
        directory = Path(directory)
        manifest = read_store_manifest(directory)
        weights = weight_files(manifest)
        weights_of = {}
        for entry in manifest.files:
            path = directory / entry.name
            optional = entry.name in weights[1:] or (entry.name not in weights and not with_text)
            if optional and not files.exists(path):
                continue
            if check == "full" or entry.file_bytes < FULL_CHECK_BYTES:
                check_file(path, entry, manifest)
            else:
                check_header(path, entry)
            if entry.name in weights:
                weights_of[entry.name] = open_weights(path, manifest)
        scaled = replace(manifest, config=scale_config(manifest.config, rope_scaling))
        return cls(directory, scaled, weights_of)

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self.manifest.config

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer's files are, if the checkpoint had any."""
        return self.directory

    def common(self, name: str) -> npt.NDArray[Any]:
        """A tensor that every rank needs, such as "layers.3.mlp_norm".

        Returns:
            A read-only view: float32 vectors; "embedding" float32 or (bf16) uint16 [V, D]; routers packed uint8 [n].
        """
        return self._files[COMMON_NAME].raw(name)

    def common_span(self) -> tuple[int, int]:
        """Where the file of what every rank needs is mapped, and its bytes."""
        weights = self._files[COMMON_NAME]
        return weights.address, weights.file_bytes

    def weight_paths(self) -> list[Path]:
        """The mapped files."""
        return [weights.path for weights in self._files.values()]

    def unit(self, kind: UnitKind, layer: int, index: int) -> npt.NDArray[np.uint8]:
        """One unit as a read-only view, uint8 [bytes], 64-byte aligned; `layer` is ignored for the vocabulary.

        Raises:
            StoreError: The unit is in no file on this machine.
        """
        held, row = self._find(kind, layer, index)
        view: npt.NDArray[np.uint8] = held.rows[row]
        return view

    def sealed_unit(self, kind: UnitKind, layer: int, index: int) -> Sealed:
        """One unit with its checksum; raises as `unit` does."""
        held, row = self._find(kind, layer, index)
        name, weights = held.tensor.spec.name, self._files[held.file]
        words = describe_unit(self.config, self.manifest.group_size, kind, layer, index)
        return Sealed(weights.path, name, words, held.rows[row], int(weights.raw(name + CHECKSUM_SUFFIX)[row]))

    def sealed_common(self) -> list[Sealed]:
        """Every tensor that all ranks need, with its checksum."""
        weights = self._files[COMMON_NAME]
        names = [name for name in weights.names() if not name.endswith(CHECKSUM_SUFFIX)]
        return [
            Sealed(
                weights.path,
                name,
                "",
                weights.raw(name).reshape(-1).view(np.uint8),
                int(weights.raw(name + CHECKSUM_SUFFIX)[0]),
            )
            for name in names
        ]

    def unit_addresses(self, kind: UnitKind, layer: int) -> npt.NDArray[np.uint64]:
        """The address of every unit of one kind in one layer, 0 where it is in no file on this machine.

        Returns:
            uint64 [units of the whole model], read-only; valid as long as the store is referenced.
        """
        name = tensor_name(kind, layer)
        if name not in self._addresses:
            addresses = np.zeros(unit_count(self.config, self.manifest.group_size, kind, layer), np.uint64)
            for _, tensor, rows in reversed(self._tensors.get(name, [])):
                offsets = np.arange(len(rows), dtype=np.uint64) * np.uint64(rows.shape[1])
                addresses[tensor.indices] = np.uint64(rows.ctypes.data) + offsets
            addresses.flags.writeable = False
            self._addresses[name] = addresses
        return self._addresses[name]

    def chunk_addresses(self, layer: int, wanted: Iterable[int]) -> npt.NDArray[np.uint64]:
        """The addresses of a layer's chunks; those that are wanted are on this machine (see `require`)."""
        del wanted
        return self.unit_addresses("chunk", layer)

    def present_units(self, kind: UnitKind, layer: int) -> npt.NDArray[np.int64]:
        """The units of one kind in one layer that are on this machine, ascending."""
        return np.flatnonzero(self.unit_addresses(kind, layer))

    def missing_units(self, kind: UnitKind, layer: int, indices: Iterable[int]) -> list[int]:
        """Those of `indices` that are in no file on this machine."""
        wanted = np.fromiter(indices, np.int64)
        missing: list[int] = wanted[self.unit_addresses(kind, layer)[wanted] == 0].tolist()
        return missing

    def require(self, kind: UnitKind, layer: int, indices: Iterable[int]) -> None:
        """Make sure that units are on this machine.

        Raises:
            StoreError: Names a unit that is not, the file that has it, and what brings it.
        """
        missing = self.missing_units(kind, layer, indices)
        if missing:
            raise self._missing(kind, layer, missing)

    def _find(self, kind: UnitKind, layer: int, index: int) -> tuple[_Held, int]:
        for held in self._tensors.get(tensor_name(kind, layer), ()):
            row = held.row_of(index)
            if row is not None:
                return held, row
        raise self._missing(kind, layer, [index])

    def _missing(self, kind: UnitKind, layer: int, missing: list[int]) -> StoreError:
        manifest = self.manifest
        holders = [
            shard_name(shard, manifest.nodes)
            for shard, units in enumerate(manifest.shards)
            if missing[0] in indices_of(units.runs(kind, layer))
        ]
        unit = describe_unit(manifest.config, manifest.group_size, kind, layer, missing[0])
        others = f" and {len(missing) - 1} more like it" if len(missing) > 1 else ""
        if not holders:
            return StoreError(f"{self.directory}: no shard of this store has {unit}{others}; choose another layout")
        return StoreError(
            f"{self.directory / holders[0]} is missing: it holds {unit}{others}, which this run needs here; "
            f"copy the file from a machine that has it, or run: {shard_command(manifest, self.directory)} "
            f"({source_note(manifest)})"
        )


def read_store_manifest(directory: Path) -> Manifest:
    """The manifest of a store that is whole; raises StoreError that says what else stands there."""
    if not files.is_directory(directory):
        what = "is not a directory" if files.exists(directory) else "does not exist"
        raise StoreError(f"{directory}: {what}; give the directory of a store, as dist-moe shard makes it")
    if files.exists(directory / MANIFEST_NAME):
        return read_manifest(directory / MANIFEST_NAME)
    if files.exists(directory / PROGRESS_NAME):
        raise StoreError(
            f"{directory}: is an incomplete store (dist-moe shard or reshard was interrupted or is still running); "
            "repeat the dist-moe shard command (or reshard) with the same options, it continues where it stopped"
        )
    if files.exists(directory / "config.json"):
        raise StoreError(
            f"{directory}: is a Hugging Face directory, not a store; run: dist-moe shard {directory} --nodes 1"
        )
    raise StoreError(f"{directory}: has no {MANIFEST_NAME}, so it is not a store; make one with dist-moe shard")
