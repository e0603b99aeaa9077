"""How large a planned store will be, by parts of the model and by nodes, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dist_moe.kernels.formats import MatrixFormat
from dist_moe.store.formats import PARTS
from dist_moe.store.layout import weight_files, weight_layout
from dist_moe.store.manifest import COMMON_NAME, Manifest
from dist_moe.store.unit_parts import unit_sizes
from dist_moe.store.units import UnitKind

_KINDS: dict[str, tuple[UnitKind, ...]] = {
    "attention": ("head", "kv_head"),
    "experts": ("chunk",),
    "lm_head": ("vocabulary",),
}


@dataclass(frozen=True)
class PartSize:
    """The packed matrices of a part, each unit once.

    Attributes:
        name: Among `PARTS`.
        bytes: With what packing fills up.
        bits_per_weight: Of weights and scales alone.
        formats: How many matrices have which.
    """

    name: str
    bytes: int
    bits_per_weight: float
    formats: dict[MatrixFormat, int]


@dataclass(frozen=True)
class StoreSizes:
    """Of a whole store.

    Attributes:
        parts: In the order of `PARTS`.
        bits_per_weight: Of all of them together.
        common_bytes: Of the file that every node has: embedding, routers, norms.
        shards: Name and bytes of each node's own file.
        text_bytes: Of the small files that a store takes along.
    """

    parts: tuple[PartSize, ...]
    bits_per_weight: float
    common_bytes: int
    shards: tuple[tuple[str, int], ...]
    text_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of all files but the manifest, which lists them."""
        return self.text_bytes + self.common_bytes + sum(count for _, count in self.shards)


def store_sizes(plan: Manifest, texts: Mapping[str, bytes]) -> StoreSizes:
    """What `plan_store` comes to, with its small files; the sizes of files are exact."""
    bits, counts = plan.formats.bits_by_part(plan.config), plan.formats.counts_by_part()
    file_bytes = {name: weight_layout(plan, name).file_bytes for name in weight_files(plan)}
    common_bytes = file_bytes.pop(COMMON_NAME)
    return StoreSizes(
        parts=tuple(
            PartSize(name, _part_bytes(plan, name), bits[name][0] / bits[name][1], dict(counts[name])) for name in PARTS
        ),
        bits_per_weight=plan.formats.bits_per_weight(plan.config),
        common_bytes=common_bytes,
        shards=tuple(file_bytes.items()),
        text_bytes=sum(map(len, texts.values())),
    )


def _part_bytes(plan: Manifest, part: str) -> int:
    layers = range(1 if part == "lm_head" else plan.config.layers)
    return sum(int(unit_sizes(plan, kind, layer).sum()) for kind in _KINDS[part] for layer in layers)
