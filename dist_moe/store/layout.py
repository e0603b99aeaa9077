"""What stands in each weight file of a store: tensor names, types and shapes, in file order.

Every tensor begins on a 64-byte boundary. The checksums come last, so that a file is written in one pass: one xxh3
per unit (in the common file: per tensor), as "<name>.xxh3".
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_moe.checkpoint.safetensors_file import FileLayout, file_layout
from dist_moe.kernels.formats import packed_bytes
from dist_moe.store.manifest import COMMON_NAME, NUMERICS_VERSION, Manifest
from dist_moe.store.placement import PLACED, Indices, indices_of, runs_of, shard_name
from dist_moe.store.placement_json import shard_to_json
from dist_moe.store.unit_parts import unit_bytes, unit_tensor_name
from dist_moe.store.units import UnitKind

CHECKSUM_SUFFIX = ".xxh3"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a store file, with the safetensors name of its type."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class UnitTensor:
    """A shard's units of one kind in one layer: row i of the tensor is unit `indices[i]`."""

    kind: UnitKind
    layer: int
    indices: Indices
    spec: TensorSpec


def unit_tensors(manifest: Manifest, shard: int) -> Iterator[UnitTensor]:
    """The packed tensors of shard `shard` (from 0) in file order; what it has no units of has no tensor."""
    units = manifest.shards[shard]
    kinds: list[tuple[UnitKind, int]] = []
    for layer in range(manifest.config.layers):
        kinds += [("head", layer), ("kv_head", layer), ("chunk", layer)]
    for kind, layer in [*kinds, ("vocabulary", 0)]:
        for name, indices in _by_tensor(manifest, kind, layer, indices_of(units.runs(kind, layer))).items():
            row_bytes = unit_bytes(manifest, kind, layer, int(indices[0]))
            yield UnitTensor(kind, layer, indices, TensorSpec(name, "U8", (len(indices), row_bytes)))


def _by_tensor(manifest: Manifest, kind: UnitKind, layer: int, indices: Indices) -> dict[str, Indices]:
    """Units by the tensor that holds them, the one of the first unit first."""
    if not len(indices):
        return {}
    if kind != "chunk" or manifest.formats.uniform_format is not None:
        return {unit_tensor_name(manifest, kind, layer, 0): indices}
    chunks = manifest.layer_chunks_per_expert(layer)
    experts = np.unique(indices // chunks).tolist()
    names = {expert: unit_tensor_name(manifest, kind, layer, expert * chunks) for expert in experts}
    name_n = np.array([names[expert] for expert in (indices // chunks).tolist()])
    return {name: indices[name_n == name] for name in dict.fromkeys(names.values())}


def shard_specs(manifest: Manifest, shard: int) -> list[TensorSpec]:
    """All tensors of a shard file, checksums included, in file order."""
    packed = [tensor.spec for tensor in unit_tensors(manifest, shard)]
    return [*packed, *(_checksums(spec, spec.shape[0]) for spec in packed)]


def common_specs(manifest: Manifest) -> list[TensorSpec]:
    """All tensors of common.safetensors, checksums included, in file order."""
    config = manifest.config
    specs = [
        TensorSpec("embedding", manifest.embedding_format.label.upper(), (config.vocabulary, config.model_dim)),
        TensorSpec("final_norm", "F32", (config.model_dim,)),
    ]
    for layer in range(config.layers):
        specs += [TensorSpec(f"layers.{layer}.{name}", "F32", shape) for name, shape in _layer_vectors(manifest)]
        if not config.is_dense(layer):
            router_bytes = packed_bytes(manifest.router_format, config.experts, config.model_dim, 0)
            specs.append(TensorSpec(f"layers.{layer}.router", "U8", (router_bytes,)))
    return [*specs, *(_checksums(spec, 1) for spec in specs)]


def file_specs(manifest: Manifest, name: str) -> list[TensorSpec]:
    """The tensors of the weight file called `name`."""
    return common_specs(manifest) if name == COMMON_NAME else shard_specs(manifest, shard_number(manifest, name))


def shard_number(manifest: Manifest, name: str) -> int:
    """Which shard (from 0) a file is; ValueError if it is none of this store's."""
    return weight_files(manifest).index(name) - 1


def weight_layout(manifest: Manifest, name: str) -> FileLayout:
    """The header of the weight file called `name`, and where its tensors go."""
    tensors = {spec.name: (spec.dtype, spec.shape) for spec in file_specs(manifest, name)}
    return file_layout(tensors, file_metadata(manifest, name))


def weight_files(manifest: Manifest) -> list[str]:
    """The names of a store's weight files: the common one, then the shards."""
    return [COMMON_NAME, *(shard_name(shard, manifest.nodes) for shard in range(manifest.nodes))]


def file_metadata(manifest: Manifest, name: str) -> dict[str, str]:
    """The tags in a weight file's header: what it is a part of and how its tensors are packed."""
    tags = {
        "format": "dist-moe",
        "format_version": str(manifest.format_version),
        "numerics_version": str(NUMERICS_VERSION),
        "source": manifest.source_name,
        "source_fingerprint": manifest.source_fingerprint,
        "weights": manifest.label,
        "group_size": str(manifest.group_size),
        "router": manifest.router_format.label,
        "embedding": manifest.embedding_format.label,
    }
    if name != COMMON_NAME:
        shard = shard_number(manifest, name)
        units = json.dumps(shard_to_json(manifest.shards[shard]), separators=(",", ":"))
        tags |= {"experts": manifest.experts, "node": str(shard + 1), "nodes": str(manifest.nodes), "units": units}
        if manifest.formats.uniform_format is None:
            chunks = {
                tensor.spec.name: tensor.indices for tensor in unit_tensors(manifest, shard) if tensor.kind == "chunk"
            }
            runs = {tensor: runs_of(indices.tolist()) for tensor, indices in chunks.items()}
            tags["chunks"] = json.dumps(runs, separators=(",", ":"))
    return tags


def shard_command(manifest: Manifest, directory: Path) -> str:
    """The command that makes a store again, or the files of it that are missing; the source has but its name."""
    words = ["dist-moe", "shard", manifest.source_name]
    placed = manifest.experts == PLACED
    words += ["--placement", str(directory)] if placed else ["--nodes", str(manifest.nodes)]
    if manifest.formats.uniform_format is None:
        words += ["--recipe", str(directory)]
    else:
        words += ["--quant", manifest.format.label, "--group-size", str(manifest.group_size)]
    words += [] if manifest.scales == manifest.formats.default_scales else ["--scales", manifest.scales.label]
    words += ["--importance", "FILE"] if manifest.importance else []
    words += [*([] if placed else ["--experts", manifest.experts]), "-o", str(directory)]
    return shlex.join(words)


def source_note(manifest: Manifest) -> str:
    """What to put in place of the name in `shard_command`: stores do not keep paths of other machines."""
    demo = ", or nothing for the bundled demo" if manifest.source_name == "demo" else ""
    calibration = f", and for FILE what dist-moe calibrate wrote, {manifest.importance}" if manifest.importance else ""
    return f"{manifest.source_name} is the source's name: give its path{demo}{calibration}"


def _checksums(spec: TensorSpec, count: int) -> TensorSpec:
    return TensorSpec(spec.name + CHECKSUM_SUFFIX, "U64", (count,))


def _layer_vectors(manifest: Manifest) -> list[tuple[str, tuple[int]]]:
    config = manifest.config
    names = [("attention_norm", config.model_dim), ("mlp_norm", config.model_dim)]
    names += [("q_norm", config.head_dim), ("k_norm", config.head_dim)]
    if config.attention_bias:
        names.append(("q_bias", config.heads * config.head_dim))
        names += [(name, config.kv_heads * config.head_dim) for name in ("k_bias", "v_bias")]
        names.append(("o_bias", config.model_dim))
    return [(name, (length,)) for name, length in names]
