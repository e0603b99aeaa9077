"""manifest.json: what a store holds and how it was made, read strictly.

The text is canonical (one text per content) and carries its own checksum, so a flipped bit anywhere is seen.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dist_moe.errors import StoreError
from dist_moe.kernels.formats import MatrixFormat, ScaleChoice, WeightFormat
from dist_moe.model_config import ModelConfig
from dist_moe.store.checksum import checksum_text
from dist_moe.store.fields import Fields
from dist_moe.store.formats import ModelFormats
from dist_moe.store.formats_json import read_formats
from dist_moe.store.model_json import model_from_json, model_to_json
from dist_moe.store.placement import EXPERT_LAYOUTS, PLACED, Placement, ShardUnits, unit_counts
from dist_moe.store.placement_json import LARGEST_WEIGHT, shard_from_json, shard_to_json
from dist_moe.store.units import GROUP_SIZES, chunks_per_expert, layer_chunk_width, output_group

FORMAT_VERSION = 1
PLACED_FORMAT_VERSION = 2  # of stores that were cut as a placement says; the others stay readable for old programs
SCALES_FORMAT_VERSION = 3  # of stores whose scales are not the default ones
MIXED_FORMAT_VERSION = 4  # of stores whose matrices are of several formats or groups
NUMERICS_VERSION = 1  # equals DM_NUMERICS_VERSION; a test compares them
MANIFEST_NAME = "manifest.json"
PROGRESS_NAME = ".progress.json"  # while a store is being written: a manifest that lists the finished files
COMMON_NAME = "common.safetensors"

_LARGEST_MANIFEST_BYTES = 1 << 28
_CHECKSUM = r"[0-9a-f]{16}"
_FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}"


@dataclass(frozen=True)
class StoreFile:
    """One file of a store; checksums are xxh3 as 16 hexadecimal digits."""

    name: str
    file_bytes: int
    header_bytes: int  # of a safetensors file, its length field included; 0 for other files
    header_checksum: str  # of the first header_bytes bytes
    checksum: str  # of the whole file
    nonfinite: Mapping[str, int]  # source tensors with NaN or infinite weights in this file, and how many


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json. Floats of the model are kept as bits (NUMERICS rule 3)."""

    config: ModelConfig
    source_name: str
    source_fingerprint: str
    formats: ModelFormats  # of q, k, v, o, experts, dense MLPs and lm_head
    group_size: int  # weights per scale, 0 for whole rows; the largest of several; decides chunk widths in every format
    router_format: WeightFormat  # f32 or bf16
    embedding_format: WeightFormat  # f32 or bf16
    experts: str  # "whole", "sliced" or "placed": how the shards were cut
    nodes: int
    shards: tuple[ShardUnits, ...]  # one per node, in the order of their file names
    package_version: str
    files: tuple[StoreFile, ...]
    node_weights: tuple[int, ...] = ()  # of a placement: work of each shard's node in the same time
    scales: ScaleChoice = ScaleChoice.ABSMAX  # how those of q8 and q4 were chosen
    importance: str = ""  # fingerprint of what weighted the error of each column in the search for scales

    @property
    def format_version(self) -> int:
        """The lowest one that can say all this."""
        if self.formats.uniform_format is None:
            return MIXED_FORMAT_VERSION
        if self.scales != ScaleChoice.ABSMAX:
            return SCALES_FORMAT_VERSION
        return PLACED_FORMAT_VERSION if self.experts == PLACED else FORMAT_VERSION

    @property
    def format(self) -> WeightFormat:
        """Of all matrices, or of most of the experts' weights."""
        return self.formats.main

    @property
    def label(self) -> str:
        """The weights in a word: "q4", or "q4-mixed" where only most are."""
        return self.formats.label

    @property
    def placement(self) -> Placement:
        """Which units stand in which shard, for another store."""
        counts = unit_counts(self.config, self.group_size)
        return Placement(self.source_name, self.node_weights or (1,) * self.nodes, counts, self.shards)

    def matrix_format(self, key: str, layer: int, expert: int = 0) -> MatrixFormat:
        """How a matrix is packed.

        Args:
            key: As for `ModelFormats.matrix`.
            layer: Its layer; of lm_head anything.
            expert: Of gate, up and down.

        Returns:
            Its format and group; group 0 where there are no scales.
        """
        found = self.formats.matrix(key, layer, expert)
        if key == "o" and found.format.quantized:
            return MatrixFormat(found.format, output_group(self.config, found.group))
        return found

    def layer_chunk_width(self, layer: int) -> int:
        """Hidden units of each of a layer's chunks."""
        return layer_chunk_width(self.config, self.group_size, layer)

    def layer_chunks_per_expert(self, layer: int) -> int:
        """Chunks of each expert of a layer; a dense MLP is one expert."""
        return chunks_per_expert(self.config, self.group_size, layer)

    @cached_property
    def common_file_bytes(self) -> int:
        """The size of common.safetensors, also of a store that is not written yet."""
        from dist_moe.store.layout import weight_layout  # which is about manifests

        common = self.file(COMMON_NAME)
        return common.file_bytes if common else weight_layout(self, COMMON_NAME).file_bytes

    def file(self, name: str) -> StoreFile | None:
        """The entry of a file, or None."""
        return next((file for file in self.files if file.name == name), None)

    @property
    def nonfinite(self) -> dict[str, int]:
        """Source tensors with NaN or infinite weights, and how many."""
        counts = Counter[str]()
        for file in self.files:
            counts.update(file.nonfinite)
        return dict(sorted(counts.items()))

    def recipe(self) -> dict[str, Any]:
        """What decides every byte of the weight files, as JSON: equal recipes give equal files."""
        return _body(replace(self, files=(), package_version=""))

    def render(self) -> str:
        """The text of manifest.json."""
        body = _body(self)
        return _dump({**body, "checksum": checksum_text(_dump(body).encode())})


def parse_manifest(text: str, where: str) -> Manifest:
    """Read and check the text of a manifest.

    Args:
        text: What the file holds.
        where: Its path, for errors.

    Raises:
        StoreError: The text is damaged, of another version, or has a field that is missing, unknown or out of range.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where}: is not valid JSON ({error}); {_ADVICE}") from None
    entry = Fields(value, where, _ADVICE)
    format_version = _check_version(entry, where, "format_version", FORMAT_VERSION, MIXED_FORMAT_VERSION)
    _check_version(entry, where, "numerics_version", NUMERICS_VERSION, NUMERICS_VERSION)
    found = entry.text("checksum", _CHECKSUM)
    expected = checksum_text(_dump({key: item for key, item in value.items() if key != "checksum"}).encode())
    if found != expected:
        raise StoreError(f"{where}: its checksum is {found}, but its contents give {expected}; {_ADVICE}")
    manifest = _from_json(entry, format_version)
    if manifest.render() != text:
        raise StoreError(f"{where}: its text is not as dist-moe writes it; {_ADVICE}")
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest file.

    Raises:
        StoreError: The file cannot be read, or `parse_manifest` refuses it.
    """
    try:
        if path.stat().st_size > _LARGEST_MANIFEST_BYTES:
            raise StoreError(f"{path}: is larger than any manifest ({_LARGEST_MANIFEST_BYTES} bytes); {_ADVICE}")
        text = path.read_bytes().decode()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except UnicodeDecodeError:
        raise StoreError(f"{path}: is not UTF-8 text; {_ADVICE}") from None
    return parse_manifest(text, str(path))


_ADVICE = "it was damaged or edited; copy it again from another machine or make the store again with dist-moe shard"


def _check_version(entry: Fields, where: str, key: str, first: int, last: int) -> int:
    found = entry.integer(key, 0, 2**31)
    if not first <= found <= last:
        known, advice = f"reads up to version {last}", "install a newer dist-moe"
        if found < first:
            known, advice = f"reads no older one than version {first}", "make the store again with dist-moe shard"
        raise StoreError(f"{where}: has {key.replace('_', ' ')} {found}, but this dist-moe {known}: {advice}")
    return found


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"


def _body(manifest: Manifest) -> dict[str, Any]:
    weights = {"node_weights": list(manifest.node_weights)} if manifest.node_weights else {}
    mixed = manifest.formats.uniform_format is None
    scales = {} if manifest.scales == ScaleChoice.ABSMAX and not mixed else {"scales": manifest.scales.label}
    formats = {"formats": manifest.formats.to_json()} if mixed else {}
    importance = {"importance": manifest.importance} if manifest.importance else {}
    return {
        "format_version": manifest.format_version,
        "numerics_version": NUMERICS_VERSION,
        "package_version": manifest.package_version,
        "source": {"name": manifest.source_name, "fingerprint": manifest.source_fingerprint},
        "weights": manifest.label,
        "group_size": manifest.group_size,
        **formats,
        **scales,
        **importance,
        "router": manifest.router_format.label,
        "embedding": manifest.embedding_format.label,
        "experts": manifest.experts,
        "nodes": manifest.nodes,
        **weights,
        "model": model_to_json(manifest.config),
        "shards": [shard_to_json(shard) for shard in manifest.shards],
        "files": [{**vars(file), "nonfinite": dict(sorted(file.nonfinite.items()))} for file in manifest.files],
    }


def _from_json(entry: Fields, format_version: int) -> Manifest:
    layouts = {FORMAT_VERSION: EXPERT_LAYOUTS, PLACED_FORMAT_VERSION: (PLACED,)}
    experts = entry.choice("experts", layouts.get(format_version, (*EXPERT_LAYOUTS, PLACED)))
    placed = experts == PLACED
    source = entry.object("source")
    config = model_from_json(entry.object("model"))
    group_size = entry.integer("group_size", 0, max(GROUP_SIZES))
    formats = read_formats(entry, config, group_size, mixed=format_version == MIXED_FORMAT_VERSION)
    nodes = entry.integer("nodes", 1, 8191)
    counts = unit_counts(config, group_size)
    scales = _scales(entry, format_version)
    searched = scales == ScaleChoice.MSE
    manifest = Manifest(
        config=config,
        source_name=source.text("name"),
        source_fingerprint=source.text("fingerprint"),
        formats=formats,
        group_size=group_size,
        router_format=WeightFormat.parse(entry.choice("router", ("f32", "bf16"))),
        embedding_format=WeightFormat.parse(entry.choice("embedding", ("f32", "bf16"))),
        experts=experts,
        nodes=nodes,
        shards=tuple(shard_from_json(shard, counts) for shard in entry.objects("shards")),
        package_version=entry.text("package_version"),
        files=tuple(_file(file) for file in entry.objects("files")),
        node_weights=tuple(entry.integers("node_weights", 1, LARGEST_WEIGHT)) if placed else (),
        scales=scales,
        importance=entry.text("importance") if searched and "importance" in entry else "",
    )
    source.done()
    entry.done()
    entry.require(len(manifest.shards) == nodes, f"has {len(manifest.shards)} shards for {nodes} nodes")
    entry.require(
        not placed or len(manifest.node_weights) == nodes, f"has not one node weight for each of {nodes} nodes"
    )
    names = [file.name for file in manifest.files]
    entry.require(len(names) == len(set(names)), "names a file twice")
    return manifest


def _scales(entry: Fields, format_version: int) -> ScaleChoice:
    if format_version < SCALES_FORMAT_VERSION:
        return ScaleChoice.ABSMAX
    choices = (ScaleChoice.MSE,) if format_version == SCALES_FORMAT_VERSION else tuple(ScaleChoice)
    return ScaleChoice.parse(entry.choice("scales", [choice.label for choice in choices]))


def _file(entry: Fields) -> StoreFile:
    file = StoreFile(
        name=entry.text("name", _FILE_NAME),
        file_bytes=entry.integer("file_bytes", 0, 2**62),
        header_bytes=entry.integer("header_bytes", 0, 1 << 28),
        header_checksum=entry.text("header_checksum", _CHECKSUM),
        checksum=entry.text("checksum", _CHECKSUM),
        nonfinite=entry.counts("nonfinite"),
    )
    entry.done()
    entry.require(file.header_bytes <= file.file_bytes, "has a header longer than the file")
    return file
