"""Checksums of a store's units in parts, so that ranks of one host verify it together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.store.checksum import checksum_rows
from dist_moe.store.layout import CHECKSUM_SUFFIX, UnitTensor, shard_number, unit_tensors, weight_files
from dist_moe.store.manifest import COMMON_NAME, Manifest
from dist_moe.store.reader import Store
from dist_moe.store.sealed import damage_text
from dist_moe.store.units import describe_unit
from dist_moe.store.verify import ADVICE, open_weights


@dataclass(frozen=True)
class CheckedRows:
    """Bytes of a mapped file that have checksums beside them.

    Attributes:
        file: The file's name.
        name: The tensor.
        rows: uint8 [units, bytes of one unit]; a tensor of the common file is one row.
        expected: uint64 [units], the checksums that the file says.
        describe: Names the unit in a row; "" for a tensor that is none.
    """

    file: str
    name: str
    rows: npt.NDArray[np.uint8]
    expected: npt.NDArray[np.uint64]
    describe: Callable[[int], str]


def checked_rows(store: Store) -> Iterator[CheckedRows]:
    """Everything with a checksum in the weight files that are here, in the order of the files."""
    manifest = store.manifest
    for file in weight_files(manifest):
        if file not in store.present_files:
            continue
        weights = open_weights(store.directory / file, manifest)
        describers = {} if file == COMMON_NAME else _unit_describers(manifest, file)
        for name in weights.names():
            if name + CHECKSUM_SUFFIX not in weights.names():
                continue
            expected = weights.raw(name + CHECKSUM_SUFFIX).view(np.uint64)
            rows = weights.raw(name).reshape(-1).view(np.uint8).reshape(len(expected), -1)
            yield CheckedRows(file, name, rows, expected, describers.get(name, lambda _: ""))


def damages_in_share(store: Store, part: int, parts: int) -> tuple[list[str], int]:
    """Compare one part of the mapped weights with their checksums; all parts together are the whole.

    Args:
        store: An open store.
        part: Which part.
        parts: How many there are; they are of equal bytes, but for a unit.

    Returns:
        One sentence per damage, and the bytes that were read.
    """
    tensors = list(checked_rows(store))
    total_bytes = sum(tensor.rows.nbytes for tensor in tensors)
    # A row belongs to the part in which its first byte lies.
    first_byte, last_byte = total_bytes * part // parts, total_bytes * (part + 1) // parts
    damages, before_bytes, read_bytes = [], 0, 0
    for tensor in tensors:
        row_bytes = tensor.rows.shape[1]
        first, last = (-(-max(0, byte - before_bytes) // row_bytes) for byte in (first_byte, last_byte))
        own = slice(min(first, len(tensor.rows)), min(last, len(tensor.rows)))
        actual = checksum_rows(tensor.rows[own])
        for row in np.flatnonzero(actual != tensor.expected[own]).tolist():
            unit = tensor.describe(own.start + row)
            text = damage_text(tensor.name, unit, int(actual[row]), int(tensor.expected[own][row]))
            damages.append(f"{store.directory / tensor.file}: {text}; {ADVICE}")
        before_bytes += tensor.rows.nbytes
        read_bytes += (own.stop - own.start) * row_bytes
    return damages, read_bytes


def _unit_describers(manifest: Manifest, file: str) -> dict[str, Callable[[int], str]]:
    """For each packed tensor of a shard, what names the unit in a row."""

    def describer(tensor: UnitTensor) -> Callable[[int], str]:
        return lambda row: describe_unit(
            manifest.config, manifest.group_size, tensor.kind, tensor.layer, int(tensor.indices[row])
        )

    return {tensor.spec.name: describer(tensor) for tensor in unit_tensors(manifest, shard_number(manifest, file))}
