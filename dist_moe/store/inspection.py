"""What stands in a store, in one of its files, or in plain safetensors files: a report for people and programs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_moe import files
from dist_moe.checkpoint.qw3w_directory import Qw3wDirectory
from dist_moe.checkpoint.qw3w_file import TYPE_NAMES as QW3W_TYPES
from dist_moe.checkpoint.qw3w_file import Qw3wFile
from dist_moe.checkpoint.safetensors_file import SafetensorsFile
from dist_moe.checkpoint.source import file_format, require_gguf
from dist_moe.errors import StoreError
from dist_moe.store.checksum import checksum_text
from dist_moe.store.formats import label_words
from dist_moe.store.layout import CHECKSUM_SUFFIX, weight_files
from dist_moe.store.manifest import MANIFEST_NAME, Manifest, StoreFile, read_manifest
from dist_moe.store.placement import indices_of
from dist_moe.store.reader import read_store_manifest
from dist_moe.store.units import unit_count
from dist_moe.store.verify import check_header, compare_checksums

_EVERY_NODE = "every node"
_UNIT_KEYS = {"heads": "heads", "kv_heads": "kv_heads", "vocabulary": "vocabulary", "chunks": "chunks"}


@dataclass(frozen=True)
class TensorReport:
    """One tensor; `units` says which of the model's units are its rows, `checksum` is xxh3 over its checksums."""

    name: str
    kind: str  # "heads", "kv_heads", "chunks", "vocabulary", "router", "embedding", ...
    format: str  # "q4, groups of 32", or the safetensors type
    shape: tuple[int, ...]
    tensor_bytes: int
    units: list[tuple[int, int]] | None = None
    checksum: str | None = None


@dataclass(frozen=True)
class FileReport:
    """One file; a shard that is not here has no tensors."""

    name: str
    file_bytes: int
    owner: str | None  # "node 2", "every node", or unknown
    checksum: str | None  # of the whole file, as the manifest says
    present: bool = True
    tensors: list[TensorReport] = field(default_factory=list)


@dataclass(frozen=True)
class Totals:
    """All tensors of one kind."""

    tensors: int
    units: int
    total_bytes: int


@dataclass(frozen=True)
class Inspection:
    """The whole report."""

    path: Path
    kind: str  # "store", "store file", "safetensors", "GGUF" or "QW3W"
    manifest: Manifest | None
    files: list[FileReport]

    def totals(self) -> dict[str, Totals]:
        """Tensors, units and bytes of every kind of tensor, in the order of their first appearance."""
        totals: dict[str, Totals] = {}
        for tensor in (tensor for file in self.files for tensor in file.tensors):
            known = totals.get(tensor.kind, Totals(0, 0, 0))
            units = sum(stop - first for first, stop in tensor.units) if tensor.units else 1
            totals[tensor.kind] = Totals(
                known.tensors + 1, known.units + units, known.total_bytes + tensor.tensor_bytes
            )
        return totals


def inspect_path(path: Path) -> Inspection:
    """Report on a store, one of its files, a Hugging Face directory or file, or a GGUF or QW3W file.

    Raises:
        StoreError: The path is none of these, or a store that cannot be opened.
        CheckpointError: A safetensors, GGUF or QW3W file is damaged.
        EnvironmentMismatch: The package that reads GGUF files is not installed.
    """
    if found := file_format(path):
        return Inspection(path, found, None, [_gguf_report(path) if found == "GGUF" else _qw3w_report(path)])
    if files.is_file(path):
        manifest = _manifest_beside(path)
        entry = manifest.file(path.name) if manifest else None
        report = _file_report(path, entry)
        return Inspection(path, "store file" if report.owner else "safetensors", manifest, [report])
    weights = sorted(path.glob("*.safetensors")) if files.is_directory(path) else []
    if weights and files.exists(path / "config.json") and not _is_store(path):
        return Inspection(path, "safetensors", None, [_file_report(file, None) for file in weights])
    manifest = read_store_manifest(path)
    return Inspection(path, "store", manifest, [_store_file_report(path, entry, manifest) for entry in manifest.files])


def verify_lone_file(path: Path) -> list[str]:
    """Compare a store file that stands without its manifest with the checksums in it; one sentence per difference.

    Raises:
        StoreError: The file has no checksums.
    """
    if file_format(path):
        raise StoreError(f"{path}: has no checksums, as only the files of a store have them; leave out --verify")
    weights = SafetensorsFile(path)
    report = _file_report(path, None)
    if not any(tensor.checksum for tensor in report.tensors):
        raise StoreError(f"{path}: has no checksums, as only the files of a store have them; leave out --verify")
    units = {tensor.name: _unit_namer(tensor) for tensor in report.tensors if tensor.units}
    return [f"{path}: {damage}" for damage in compare_checksums(weights, units)]


def chunk_copies(manifest: Manifest) -> npt.NDArray[np.int64]:
    """In how many shards each expert chunk stands, int64 [chunks of all layers]."""
    counts = []
    for layer in range(manifest.config.layers):
        shards = [indices_of(shard.runs("chunk", layer)) for shard in manifest.shards]
        total = unit_count(manifest.config, manifest.group_size, "chunk", layer)
        counts.append(np.bincount(np.concatenate(shards), minlength=total))
    return np.concatenate(counts)


def _gguf_report(path: Path) -> FileReport:
    require_gguf(path)
    from dist_moe.checkpoint.gguf_file import GgufFile

    file = GgufFile(path)
    tensors = [
        TensorReport(name, re.sub(r"^blk\.\d+\.", "", name), tensor.type, tensor.shape, tensor.data.nbytes)
        for name, tensor in file.tensors.items()
    ]
    return FileReport(path.name, file.file_bytes, None, None, tensors=tensors)


def _qw3w_report(path: Path) -> FileReport:
    file = Qw3wDirectory(path) if files.is_directory(path) else Qw3wFile(path)
    tensors = [
        TensorReport(name, re.sub(r"\.\d+\.", ".N.", name), QW3W_TYPES[record.dtype], record.shape, record.nbytes)
        for name, record in file.records.items()
    ]
    return FileReport(path.name, file.file_bytes, None, None, tensors=tensors)


def _unit_namer(tensor: TensorReport) -> Callable[[int], str]:
    indices = [index for first, stop in tensor.units or () for index in range(first, stop)]
    return lambda row: f"unit {indices[row] if row < len(indices) else row}"


def _is_store(directory: Path) -> bool:
    return files.exists(directory / MANIFEST_NAME) or files.exists(directory / "common.safetensors")


def _manifest_beside(path: Path) -> Manifest | None:
    manifest_path = path.parent / MANIFEST_NAME
    if path.suffix != ".safetensors" or not files.exists(manifest_path):
        return None
    manifest = read_manifest(manifest_path)
    return manifest if manifest.file(path.name) else None


def _store_file_report(directory: Path, entry: StoreFile, manifest: Manifest) -> FileReport:
    path = directory / entry.name
    names = weight_files(manifest)
    present = files.exists(path)
    if present and entry.name in names:
        check_header(path, entry)
        return _file_report(path, entry)
    shard = names.index(entry.name) if entry.name in names else 0
    owner = f"node {shard}" if shard else _EVERY_NODE
    return FileReport(entry.name, entry.file_bytes, owner, entry.checksum, present)


def _file_report(path: Path, entry: StoreFile | None) -> FileReport:
    weights = SafetensorsFile(path)
    tags = weights.metadata if weights.metadata.get("format") == "dist-moe" else {}
    names = weights.names()
    owner = None
    if tags:
        owner = f"node {tags['node']}" if "node" in tags else _EVERY_NODE
    tensors = [
        _tensor_report(weights, name, tags)
        for name in names
        if not (name.endswith(CHECKSUM_SUFFIX) and name.removesuffix(CHECKSUM_SUFFIX) in names)
    ]
    return FileReport(path.name, weights.file_bytes, owner, entry.checksum if entry else None, True, tensors)


def _tensor_report(weights: SafetensorsFile, name: str, tags: dict[str, str]) -> TensorReport:
    checksum = None
    if tags and name + CHECKSUM_SUFFIX in weights.names():
        values = np.ascontiguousarray(weights.raw(name + CHECKSUM_SUFFIX)).view(np.uint64)
        checksum = f"{values[0]:016x}" if len(values) == 1 else checksum_text(values)
    kind = _kind(name) if tags else "tensors"
    return TensorReport(
        name=name,
        kind=kind,
        format=_format(name, kind, weights.dtype(name), tags),
        shape=tuple(weights.shape(name)),
        tensor_bytes=weights.entry(name).nbytes,
        units=_units(name, kind, tags),
        checksum=checksum,
    )


def _kind(name: str) -> str:
    """The last part of a tensor's name, but for the formats that follow it where a store has several."""
    return next((part for part in name.split(".") if part in _UNIT_KEYS), name.split(".")[-1])


def _format(name: str, kind: str, dtype: str, tags: dict[str, str]) -> str:
    if kind == "router" and tags:
        return tags.get("router", dtype)
    if kind not in _UNIT_KEYS or not tags:
        return dtype
    if not name.endswith(kind):
        return " and ".join(label_words(label) for label in name.split(".")[-1].split("-"))
    weights, group = tags.get("weights", dtype), tags.get("group_size", "0")
    if weights not in ("q8", "q4"):
        return weights
    return f"{weights}, {'whole rows' if group == '0' else f'groups of {group}'}"


def _units(name: str, kind: str, tags: dict[str, str]) -> list[tuple[int, int]] | None:
    if kind not in _UNIT_KEYS or "units" not in tags:
        return None
    try:
        units = json.loads(tags["units"])
        runs = units[kind]
        if kind == "chunks" and "chunks" in tags:
            runs = json.loads(tags["chunks"])[name]
        elif kind == "chunks":
            layer = int(name.split(".")[1])
            runs = next(part["runs"] for part in units[kind] if part["first_layer"] <= layer < part["stop_layer"])
        return [(int(first), int(stop)) for first, stop in runs]
    except (ValueError, TypeError, LookupError, StopIteration, RecursionError):
        return None  # tags that dist-moe did not write
