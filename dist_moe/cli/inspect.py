"""dist-moe inspect: what stands in a store, a shard or a safetensors file, and whether it is intact."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dist_moe.cli.inspect_against import show_against, show_difference
from dist_moe.cli.shard import source_path
from dist_moe.cli.values import PathName
from dist_moe.errors import StoreError, UsageError
from dist_moe.parallel.launcher import detect_launcher

if TYPE_CHECKING:
    from dist_moe.store.inspection import FileReport, Inspection, TensorReport
    from dist_moe.store.manifest import Manifest


@click.command("inspect")
@click.argument("path", metavar="STORE|SHARD", type=PathName())
@click.option("--verify", is_flag=True, help="Recompute every checksum; damage is named and gives exit code 2.")
@click.option(
    "--against",
    metavar="SRC",
    type=PathName(),
    help="Errors of a store against its source, per layer and kind of matrix: max, rms, cosine; and whether scales, "
    "groups and padding are sound (exit code 2 if not).",
)
@click.option(
    "--diff",
    metavar="STORE",
    type=PathName(),
    help="Which units differ in two stores of one model, byte by byte, however they are cut: --diff A B. Exit code 0 "
    "if what is here is equal, else 2.",
)
@click.option("--full", is_flag=True, help="With --against, a line for each tensor; with --diff, all differing units.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(path: str, verify: bool, against: str | None, diff: str | None, full: bool, as_json: bool) -> None:
    """List the tensors of a store, of one of its files, of a Hugging Face directory or file, or of a GGUF or QW3W file.

    Each with its format, size, owner (the node whose shard has it) and checksum, and totals per kind.
    """
    if not detect_launcher(os.environ).is_first:
        return
    if verify + (against is not None) + (diff is not None) > 1:
        raise UsageError("--verify, --against and --diff are three questions: ask one at a time")
    if full and against is None and diff is None:
        raise UsageError("--full: belongs to --against or --diff; leave it out, or add one of them")
    if against is not None:
        show_against(Path(path), source_path(against, quiet=as_json), full, as_json)
        return
    if diff is not None:
        show_difference(Path(diff), Path(path), full, as_json)
        return
    from dist_moe.store.inspection import inspect_path

    report = inspect_path(Path(path))
    damages = _verify(report) if verify else None
    if as_json:
        click.echo(json.dumps(_as_json(report, damages), indent=1))
    else:
        for line in _as_text(report):
            click.echo(line)
        if damages == []:
            click.echo(_verdict(report))
    if damages:
        raise StoreError("\n".join(damages))


def _verify(report: Inspection) -> list[str]:
    from dist_moe.store.inspection import verify_lone_file
    from dist_moe.store.verify import verify_store

    if report.manifest is None:
        return [damage for file in report.files for damage in verify_lone_file(_file_path(report, file))]
    names = {file.name for file in report.files}
    entries = [entry for entry in report.manifest.files if entry.name in names]
    directory = report.path if report.path.is_dir() else report.path.parent
    if not sys.stderr.isatty():
        return verify_store(directory, report.manifest, entries, lambda _: None)
    total_bytes = sum(entry.file_bytes for entry in entries)
    with click.progressbar(length=total_bytes, label="verifying", file=sys.stderr) as bar:
        return verify_store(directory, report.manifest, entries, bar.update)


def _verdict(report: Inspection) -> str:
    """What an undamaged report's verification comes to; a store on one of several nodes lacks shards."""
    shards = [file for file in report.files if file.owner and file.owner.startswith("node")]
    absent = [file.name for file in report.files if not file.present]
    if not absent:
        return "verified: every checksum agrees"
    are = "is" if len(absent) == 1 else "are"
    here = len(shards) - len(absent)
    return f"verified: {here} of {len(shards)} shards are here and agree; {', '.join(absent)} {are} not on this machine"


def _file_path(report: Inspection, file: FileReport) -> Path:
    return report.path / file.name if report.path.is_dir() else report.path


def _as_json(report: Inspection, damages: list[str] | None) -> dict[str, Any]:
    result: dict[str, Any] = {"path": str(report.path), "kind": report.kind}
    if report.manifest is not None:
        result["store"] = _facts(report.manifest)
    result["files"] = [asdict(file) for file in report.files]
    result["totals"] = {kind: asdict(totals) for kind, totals in report.totals().items()}
    if damages is not None:
        result["damages"] = damages
    return result


def _facts(manifest: Manifest) -> dict[str, Any]:
    config = manifest.config
    return {
        "source": manifest.source_name,
        "architecture": config.architecture,
        "layers": config.layers,
        "model_dim": config.model_dim,
        "query_heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "experts": config.experts,
        "experts_per_token": config.experts_per_token,
        "vocabulary": config.vocabulary,
        "max_positions": config.max_positions,
        "weights": manifest.label,
        "bits_per_weight": round(manifest.formats.bits_per_weight(config), 4),
        **_formats(manifest),
        "group_size": manifest.group_size,
        "router": manifest.router_format.label,
        "embedding": manifest.embedding_format.label,
        "expert_layout": manifest.experts,
        "nodes": manifest.nodes,
        **_copies(manifest),
        "chunk_widths": sorted({manifest.layer_chunk_width(layer) for layer in range(config.layers)}),
        "nonfinite": manifest.nonfinite,
        "package_version": manifest.package_version,
    }


def _formats(manifest: Manifest) -> dict[str, Any]:
    """Of a store of several formats: how many matrices of each part have which."""
    if manifest.formats.uniform_format is not None:
        return {}
    from dist_moe.store.formats import format_words

    counts = manifest.formats.counts_by_part()
    return {f"{part}_formats": {format_words(own): n for own, n in found.items()} for part, found in counts.items()}


def _copies(manifest: Manifest) -> dict[str, Any]:
    """Of a placed store: how the nodes differ, and in how many shards its expert chunks stand."""
    if not manifest.node_weights:
        return {}
    from dist_moe.store.inspection import chunk_copies

    counts = chunk_copies(manifest)
    return {
        "node_weights": list(manifest.node_weights),
        "chunk_copies": {
            "fewest": int(counts.min()),
            "mean": round(float(counts.mean()), 2),
            "most": int(counts.max()),
        },
    }


def _as_text(report: Inspection) -> list[str]:
    lines = [f"{report.path}: {report.kind}"]
    if report.manifest is not None:
        lines += [f"  {key.replace('_', ' '):18} {_value(value)}" for key, value in _facts(report.manifest).items()]
    for file in report.files:
        parts = [file.name, f"{file.file_bytes:,} bytes", file.owner, file.checksum and f"xxh3 {file.checksum}"]
        lines += ["", "  ".join(part for part in parts if part) + ("" if file.present else "  (not on this machine)")]
        lines += _table(file.tensors)
    lines += ["", "totals" + ("" if all(file.present for file in report.files) else " of what is on this machine")]
    for kind, totals in report.totals().items():
        units = f"{totals.units:,} units, " if totals.units != totals.tensors else ""
        lines.append(f"  {kind:18} {totals.tensors:,} tensors, {units}{totals.total_bytes:,} bytes")
    return lines


def _table(tensors: list[TensorReport]) -> list[str]:
    """One line per tensor, in columns as wide as their longest entry."""
    if not tensors:
        return []
    rows = []
    for tensor in tensors:
        units = ",".join(str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in tensor.units or [])
        units = f"  units {units if len(units) <= 40 else units[:37] + '...'}" if units else ""
        checksum = f"  xxh3 {tensor.checksum}" if tensor.checksum else ""
        shape = f"[{', '.join(map(str, tensor.shape))}]"
        rows.append((tensor.name, tensor.format, shape, f"{tensor.tensor_bytes:,}", checksum + units))
    name, kind, shape_, size = (max(len(row[column]) for row in rows) for column in range(4))
    return [f"  {a:{name}}  {b:{kind}}  {c:{shape_}}  {d:>{size}} bytes{rest}" for a, b, c, d, rest in rows]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {count}" for key, count in value.items()) or "none"
    return str(value)
