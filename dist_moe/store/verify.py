"""Is a file what the manifest says? Sizes and headers in milliseconds, every checksum at the disk's speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from dist_moe import files
from dist_moe.checkpoint.safetensors_file import SafetensorsFile
from dist_moe.errors import DistMoeError, StoreError
from dist_moe.store.checksum import RunningChecksum, checksum_rows, checksum_text
from dist_moe.store.layout import CHECKSUM_SUFFIX, file_specs, shard_number, unit_tensors, weight_files
from dist_moe.store.manifest import COMMON_NAME, Manifest, StoreFile
from dist_moe.store.sealed import Sealed, damage_text, name_mapped
from dist_moe.store.units import describe_unit

_READ_BYTES = 1 << 24


def check_header(path: Path, entry: StoreFile) -> None:
    """Compare a file's size and header with the manifest.

    Raises:
        StoreError: The file cannot be read, is truncated or too long, or its header differs.
    """
    try:
        actual_bytes = path.stat().st_size
        if actual_bytes != entry.file_bytes:
            what = "truncated" if actual_bytes < entry.file_bytes else "too long"
            raise StoreError(f"{path}: is {what}: {entry.file_bytes} bytes expected, {actual_bytes} found; {ADVICE}")
        with path.open("rb") as file:
            actual = checksum_text(file.read(entry.header_bytes))
    except OSError as error:
        raise _unreadable(path, error) from None
    if actual != entry.header_checksum:
        raise StoreError(
            f"{path}: its header has checksum {actual}, the manifest says {entry.header_checksum}: "
            f"the file is damaged or belongs to another store; {ADVICE}"
        )


def open_weights(path: Path, manifest: Manifest) -> SafetensorsFile:
    """Map a weight file whose tensors are exactly those that the manifest implies; a SIGBUS in it names the unit.

    Raises:
        StoreError: A tensor is missing, superfluous, or of another type or shape.
    """
    try:
        weights = SafetensorsFile(path)
        found = {name: (weights.dtype(name), tuple(weights.shape(name))) for name in weights.names()}
    except DistMoeError as error:
        raise StoreError(f"{error}; {ADVICE}") from None
    expected = {spec.name: (spec.dtype, spec.shape) for spec in file_specs(manifest, path.name)}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise StoreError(
                f"{path}: tensor {name!r}: {_shape(expected.get(name))} expected from the manifest, "
                f"{_shape(found.get(name))} found; {ADVICE}"
            )
    in_units = path.name != COMMON_NAME
    name_mapped(weights, manifest, list(unit_tensors(manifest, shard_number(manifest, path.name))) if in_units else [])
    return weights


def check_file(path: Path, entry: StoreFile, manifest: Manifest) -> None:
    """Compare every byte of a file with its checksum.

    Raises:
        StoreError: As `check_header`, or a checksum differs: names the tensor and the unit.
    """
    check_header(path, entry)
    running = RunningChecksum()
    try:
        with path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                running.update(data)
    except OSError as error:
        raise _unreadable(path, error) from None
    if running.text() == entry.checksum:
        return
    if entry.header_bytes:
        for damage in damaged_units(path, manifest):
            raise StoreError(f"{path}: {damage}; {ADVICE}")
    raise StoreError(
        f"{path}: has checksum {running.text()}, the manifest says {entry.checksum}: the file is damaged; {ADVICE}"
    )


def check_sealed(sealed: Sealed, running: RunningChecksum | None = None) -> None:
    """Compare mapped weights with the checksum beside them; `running` if somebody has read them already.

    Raises:
        StoreError: They differ.
    """
    if running is None:
        running = RunningChecksum()
        running.update(sealed.data)
    if running.value() != sealed.checksum:
        raise StoreError(f"{sealed.damage(running.value())}; {ADVICE}")


def check_text_files(directory: Path, manifest: Manifest, required: bool = True) -> None:
    """Compare a store's small files, such as the tokenizer's, with their checksums, before somebody parses them.

    Args:
        directory: The store.
        manifest: Its manifest.
        required: Whether they must be there; rank 0 alone reads them.

    Raises:
        StoreError: As `check_file`.
    """
    weights = weight_files(manifest)
    for entry in manifest.files:
        if entry.name not in weights and (required or files.exists(directory / entry.name)):
            check_file(directory / entry.name, entry, manifest)


def damaged_units(path: Path, manifest: Manifest) -> list[str]:
    """Every unit or tensor of a weight file whose bytes differ from the checksum beside it, in words."""
    weights = open_weights(path, manifest)
    units: dict[str, Callable[[int], str]] = {}
    if path.name != COMMON_NAME:
        for tensor in unit_tensors(manifest, shard_number(manifest, path.name)):
            units[tensor.spec.name] = lambda row, tensor=tensor: describe_unit(  # type: ignore[misc]
                manifest.config, manifest.group_size, tensor.kind, tensor.layer, int(tensor.indices[row])
            )
    return compare_checksums(weights, units)


def compare_checksums(weights: SafetensorsFile, units: dict[str, Callable[[int], str]]) -> list[str]:
    """Compare all tensors that have checksums beside them with those.

    Args:
        weights: A file of a store.
        units: For tensors with one checksum per row: how to name the unit in a row.

    Returns:
        One text per difference.
    """
    damages = []
    for name in weights.names():
        if name.endswith(CHECKSUM_SUFFIX) or name + CHECKSUM_SUFFIX not in weights.names():
            continue
        expected = weights.raw(name + CHECKSUM_SUFFIX)
        data = np.ascontiguousarray(weights.raw(name)).view(np.uint8).reshape(len(expected), -1)
        actual = checksum_rows(data)
        for row in np.flatnonzero(actual != expected):
            unit = units[name](int(row)) if name in units else ""
            damages.append(damage_text(name, unit, int(actual[row]), int(expected[row])))
    return damages


def verify_store(
    directory: Path, manifest: Manifest, entries: Iterable[StoreFile], progress: Callable[[int], object]
) -> list[str]:
    """Compare files that are present with their checksums.

    Args:
        directory: The store.
        manifest: Its manifest.
        entries: Which of the manifest's files.
        progress: Called with the bytes of each file when it has been read.

    Returns:
        One sentence per damage, in the order of the files; weight files that are absent are not damage.
    """
    damages = []
    weights = weight_files(manifest)
    for entry in entries:
        path = directory / entry.name
        if entry.name in weights[1:] and not files.exists(path):
            continue
        try:
            check_file(path, entry, manifest)
        except StoreError as error:
            more = damaged_units(path, manifest)[1:] if "is damaged: its bytes" in str(error) else []
            damages += [str(error), *(f"{path}: {damage}; {ADVICE}" for damage in more)]
        progress(entry.file_bytes)
    return damages


def _unreadable(path: Path, error: OSError) -> StoreError:
    if isinstance(error, FileNotFoundError):
        return StoreError(f"{path}: is missing; copy it from another machine, or repeat the dist-moe shard command")
    return StoreError(f"{path}: cannot be read ({error.strerror}); allow reading it, or {ADVICE}")


def _shape(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


ADVICE = "copy it again from another machine, or remove it and repeat the dist-moe shard command"
