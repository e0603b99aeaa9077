"""dist-moe shard --dry-run: what a store will take, for people and programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

from dist_moe.kernels.formats import MatrixFormat
from dist_moe.store.formats import format_words
from dist_moe.store.manifest import Manifest
from dist_moe.store.sizes import StoreSizes, store_sizes


def show_sizes(plan: Manifest, texts: Mapping[str, bytes], destination: Path, as_json: bool) -> None:
    """Print what a planned store takes, its small files included; no store is written."""
    sizes = store_sizes(plan, texts)
    if as_json:
        click.echo(json.dumps(_as_json(plan, destination, sizes), indent=1))
        return
    for line in _as_text(plan, destination, sizes):
        click.echo(line)


def _as_json(plan: Manifest, destination: Path, sizes: StoreSizes) -> dict[str, object]:
    parts = [
        {
            "part": part.name,
            "bytes": part.bytes,
            "bits_per_weight": round(part.bits_per_weight, 4),
            "formats": {format_words(found): count for found, count in part.formats.items()},
        }
        for part in sizes.parts
    ]
    return {
        "model": plan.source_name,
        "output": str(destination),
        "weights": plan.label,
        "group_size": plan.group_size,
        "scales": plan.scales.label,
        "bits_per_weight": round(sizes.bits_per_weight, 4),
        "parts": parts,
        "common_bytes": sizes.common_bytes,
        "text_bytes": sizes.text_bytes,
        "nodes": [
            {"node": node, "file": name, "file_bytes": count, "node_bytes": count + sizes.common_bytes}
            for node, (name, count) in enumerate(sizes.shards, 1)
        ],
        "total_bytes": sizes.total_bytes,
    }


def _as_text(plan: Manifest, destination: Path, sizes: StoreSizes) -> Iterator[str]:
    yield f"{destination}: {plan.source_name} in {plan.label}, {sizes.bits_per_weight:.3f} bits per weight"
    rows = [(part.name, part.bytes, f"{part.bits_per_weight:.3f} bits per weight  ") for part in sizes.parts]
    notes = [_formats(part.formats) for part in sizes.parts]
    rows.append(("embedding, routers, norms", sizes.common_bytes, ""))
    notes.append(f"embedding {plan.embedding_format.label}, routers {plan.router_format.label}; on every node")
    for (name, count, bits), note in zip(rows, notes, strict=True):
        yield f"  {name:25}  {count:>18,} bytes  {bits}{note}"
    for node, (name, count) in enumerate(sizes.shards, 1):
        yield f"  {f'node {node}':25}  {count + sizes.common_bytes:>18,} bytes  of which {name} {count:,}"
    yield f"  {'tokenizer, settings':25}  {sizes.text_bytes:>18,} bytes"
    yield f"  {'all files':25}  {sizes.total_bytes:>18,} bytes"
    yield "no store was written"


def _formats(formats: dict[MatrixFormat, int]) -> str:
    """Such as "q4, groups of 32", or each with its number of matrices."""
    words = {format_words(found): count for found, count in formats.items()}
    if len(words) == 1:
        return next(iter(words))
    return "; ".join(f"{count:,} matrices {word}" for word, count in words.items())
