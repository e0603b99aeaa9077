"""The units of shards as JSON, in a manifest and in placement.json, and that file itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_moe import files
from dist_moe.errors import StoreError
from dist_moe.store.fields import Fields
from dist_moe.store.placement import LayerRuns, Placement, ShardUnits, UnitCounts

FORMAT_VERSION = 1
LARGEST_WEIGHT = 1 << 20
LARGEST_FILE_BYTES = 1 << 28

_MOST = 1 << 31
_ADVICE = "make one with dist-moe place MODEL --nodes N -o placement.json"


def shard_to_json(shard: ShardUnits) -> dict[str, Any]:
    """The units of one shard as a JSON object."""
    return {
        "heads": shard.heads,
        "kv_heads": shard.kv_heads,
        "vocabulary": shard.vocabulary,
        "chunks": [vars(part) for part in shard.chunks],
    }


def shard_from_json(entry: Fields, counts: UnitCounts) -> ShardUnits:
    """The units of one shard, checked; raises StoreError as `Fields` does."""
    chunks = []
    next_layer, layers = 0, len(counts.chunks)
    for part in entry.objects("chunks"):
        first_layer = part.integer("first_layer", next_layer, next_layer)
        next_layer = part.integer("stop_layer", first_layer + 1, layers)
        runs = part.runs("runs", min(counts.chunks[first_layer:next_layer]))
        chunks.append(LayerRuns(first_layer, next_layer, runs))
        part.done()
    entry.require(next_layer == layers, f"has chunks for {next_layer} of {layers} layers")
    shard = ShardUnits(
        heads=entry.runs("heads", counts.heads),
        kv_heads=entry.runs("kv_heads", counts.kv_heads),
        vocabulary=entry.runs("vocabulary", counts.vocabulary),
        chunks=tuple(chunks),
    )
    entry.done()
    return shard


def render_placement(placement: Placement) -> str:
    """The text of placement.json: a line per run of layers."""
    body = {
        "format_version": FORMAT_VERSION,
        "model": placement.model,
        "node_weights": list(placement.node_weights),
        "units": vars(placement.counts),
    }
    head = json.dumps(body, ensure_ascii=False, indent=1).removesuffix("\n}")
    shards = []
    for shard in placement.shards:
        entries = shard_to_json(shard)
        layers = ",\n    ".join(json.dumps(part) for part in entries.pop("chunks"))
        rest = json.dumps(entries).removesuffix("}")
        shards.append(f'  {rest},\n   "chunks": [\n    {layers}\n   ]}}')
    return head + ',\n "shards": [\n' + ",\n".join(shards) + "\n ]\n}\n"


def read_placement(path: Path) -> Placement:
    """Read and check a placement.json; that it fits a model is `check_placement`'s to say.

    Raises:
        StoreError: The file cannot be read, or is no placement.
    """
    kind = files.kind_of(path)
    if kind != "file":
        found = "does not exist" if kind is None else "is not a file"
        raise StoreError(f"{path}: {found}; {_ADVICE}")
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise StoreError(f"{path}: is larger than any placement ({LARGEST_FILE_BYTES} bytes); {_ADVICE}")
        value = json.loads(path.read_bytes().decode())
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: is not valid JSON ({error}); {_ADVICE}") from None
    return _placement(Fields(value, str(path), _ADVICE))


def _placement(entry: Fields) -> Placement:
    entry.integer("format_version", FORMAT_VERSION, FORMAT_VERSION)
    units = entry.object("units")
    counts = UnitCounts(
        heads=units.integer("heads", 1, _MOST),
        kv_heads=units.integer("kv_heads", 1, _MOST),
        vocabulary=units.integer("vocabulary", 1, _MOST),
        chunks=tuple(units.integers("chunks", 1, _MOST)),
    )
    units.done()
    placement = Placement(
        model=entry.text("model"),
        node_weights=tuple(entry.integers("node_weights", 1, LARGEST_WEIGHT)),
        counts=counts,
        shards=tuple(shard_from_json(shard, counts) for shard in entry.objects("shards")),
    )
    entry.done()
    nodes = len(placement.shards)
    entry.require(nodes > 0, "has no shards")
    entry.require(len(placement.node_weights) == nodes, f"has {len(placement.node_weights)} weights for {nodes} shards")
    return placement
