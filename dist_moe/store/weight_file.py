"""One weight file, written in a single pass: header, packed tensors, and last a checksum of every unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from dist_moe.checkpoint.safetensors_file import FileLayout
from dist_moe.store.checksum import RunningChecksum
from dist_moe.store.layout import CHECKSUM_SUFFIX, common_specs, shard_number, unit_tensors, weight_layout
from dist_moe.store.manifest import COMMON_NAME, Manifest, StoreFile
from dist_moe.store.pack import UnitPacker
from dist_moe.store.placement import indices_of
from dist_moe.store.writer import FileWriter

_TensorChecksums = tuple[str, list[int]]  # a tensor that was written, and one checksum per unit


def write_weight_file(
    file: FileWriter, name: str, plan: Manifest, packer: UnitPacker, on_tensor: Callable[[], None]
) -> StoreFile:
    """Write the weight file called `name` and give it its name.

    Args:
        file: Where to.
        name: A name among `weight_files(plan)`.
        plan: The store's manifest.
        packer: Makes the units, and counts what is not finite.
        on_tensor: Called after each tensor; an error that it raises ends the file.
    """
    layout = weight_layout(plan, name)
    file.write_header(layout)
    if name == COMMON_NAME:
        tensors = _write_common(file, layout, plan, packer)
    else:
        tensors = _write_units(file, layout, plan, packer, shard_number(plan, name))
    checksums: dict[str, npt.NDArray[np.uint64]] = {}
    for tensor, values in tensors:
        on_tensor()
        checksums[tensor + CHECKSUM_SUFFIX] = np.array(values, "<u8")
    for tensor, array in checksums.items():
        file.pad_to(layout.first_byte[tensor])
        file.write(array)
    file.pad_to(layout.file_bytes)
    return file.finish(packer.nonfinite)


def _write_common(
    file: FileWriter, layout: FileLayout, plan: Manifest, packer: UnitPacker
) -> Iterator[_TensorChecksums]:
    for spec in common_specs(plan):
        if spec.name.endswith(CHECKSUM_SUFFIX):
            continue
        file.pad_to(layout.first_byte[spec.name])
        running = RunningChecksum()
        for piece in packer.common(spec):
            running.update(piece)
            file.write(piece)
        yield spec.name, [running.value()]


def _write_units(
    file: FileWriter, layout: FileLayout, plan: Manifest, packer: UnitPacker, shard: int
) -> Iterator[_TensorChecksums]:
    heads = set(indices_of(plan.shards[shard].heads).tolist())
    for tensor in unit_tensors(plan, shard):
        file.pad_to(layout.first_byte[tensor.spec.name])
        values = []
        indices = tensor.indices.tolist()
        # A KV head may stand in several shards; the one with its group's first query head counts its NaNs.
        counted = [tensor.kind != "kv_head" or i * plan.config.heads_per_kv_head in heads for i in indices]
        for unit in packer.units(tensor.kind, tensor.layer, indices, counted):
            running = RunningChecksum()
            running.update(unit)
            values.append(running.value())
            file.write(unit)
        yield tensor.spec.name, values
