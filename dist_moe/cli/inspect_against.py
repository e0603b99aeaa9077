"""What `inspect --against` and `inspect --diff` print."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dist_moe.errors import StoreError

if TYPE_CHECKING:
    from dist_moe.store.against import Errors, TensorErrors
    from dist_moe.store.differences import StoreDifference

_SHOWN = 10
_COLUMNS = ("max error", "rms error", "relative", "cosine")


def show_against(path: Path, source_path: Path, full: bool, as_json: bool) -> None:
    """Print the errors of a store against its source.

    Raises:
        StoreError: Scales, groups or padding are not as they should be.
        UsageError, CheckpointError: The source is another model, or damaged.
    """
    from dist_moe.checkpoint.source import open_source
    from dist_moe.kernels import Kernels
    from dist_moe.store.against import Errors, compare
    from dist_moe.store.decoded import DecodedStore
    from dist_moe.store.reader import Store

    source, store = open_source(source_path), Store.open(path, with_text=False)
    with Kernels(len(os.sched_getaffinity(0))) as kernels:
        decoded = DecodedStore(store, kernels)
        weights = sum(math.prod(decoded.shape(name)) for name in decoded.names())
        with _progress(weights, "comparing") as progress:
            tensors = list(compare(decoded, source, progress))
    total = Errors()
    for tensor in tensors:
        total.add(tensor.errors)
    same = source.fingerprint() == store.manifest.source_fingerprint
    if as_json:
        click.echo(json.dumps(_errors_json(path, source_path, same, tensors, total, full), indent=1))
    else:
        for line in _errors_text(path, source_path, same, tensors, total, full):
            click.echo(line)
    if problems := total.problems():
        bad = next(tensor.tensor for tensor in tensors if tensor.errors.problems())
        raise StoreError(
            f"{path}: {', '.join(problems)} (first in {bad}): it was not made from {source_path}, or it is damaged; "
            "examine it with dist-moe inspect --verify, or make it again with dist-moe shard"
        )


def show_difference(path: Path, other: Path, full: bool, as_json: bool) -> None:
    """Print which units of two stores differ.

    Raises:
        StoreError: Some do.
        UsageError: They are of different models.
    """
    from dist_moe.store.differences import compare_stores, unit_total
    from dist_moe.store.reader import Store

    first, second = (Store.open(directory, with_text=False) for directory in (path, other))
    with _progress(unit_total(first.manifest), "comparing") as progress:
        found = compare_stores(first, second, progress)
    if as_json:
        kinds = [asdict(kind) | {"differing": list(kind.differing)} for kind in found.kinds]
        facts = {"made_with": found.facts, "cut": found.cut, "equal": found.equal, "absent": found.absent}
        named = [asdict(matrix) for matrix in (found.formats if full else found.formats[:_SHOWN])]
        facts["formats"] = {"matrices": found.matrices, "differing": len(found.formats), "named": named}
        click.echo(json.dumps({"first": str(path), "second": str(other), **facts, "kinds": kinds}, indent=1))
    else:
        for line in _difference_text(path, other, found, full):
            click.echo(line)
    if not found.equal:
        raise StoreError(
            f"{path} and {other} differ in {found.differing} units, tensors or files; if they should be alike, make "
            "one of them again or copy it"
        )


def _errors_json(
    path: Path, source: Path, same: bool, tensors: Sequence[TensorErrors], total: Errors, full: bool
) -> dict[str, Any]:
    from dist_moe.store.against import grouped

    def figures(errors: Errors) -> dict[str, Any]:
        names = ("tensors", "weights", "nonfinite")
        figures = {"max": errors.largest, "rms": errors.rms, "relative": errors.relative, "cosine": errors.cosine}
        return {name: getattr(errors, name) for name in names} | figures

    result: dict[str, Any] = {"path": str(path), "against": str(source), "same_source": same}
    result["layers"] = [
        {"layer": layer, "kind": kind, "format": label, **figures(errors)}
        for layer, kind, label, errors in grouped(tensors, with_layer=True)
    ]
    result["kinds"] = [
        {"kind": kind, "format": label, **figures(errors)} for _, kind, label, errors in grouped(tensors, False)
    ]
    if full:
        result["tensors"] = [
            {"tensor": tensor.tensor, "format": tensor.format, **figures(tensor.errors)} for tensor in tensors
        ]
    names = ("scales", "bad_scales", "empty_groups", "wrong_groups", "padding")
    return result | {"checks": {name: getattr(total, name) for name in names}}


def _errors_text(
    path: Path, source: Path, same: bool, tensors: Sequence[TensorErrors], total: Errors, full: bool
) -> list[str]:
    from dist_moe.store.against import grouped

    lines = [f"{path} against {source}"]
    if not same:
        lines.append("note: the store was made from another version or form of this model")
    if full:
        rows = [(tensor.tensor, tensor.format, tensor.errors) for tensor in tensors]
    else:
        rows = [
            (kind if layer is None else f"layer {layer}  {kind}", label, errors)
            for layer, kind, label, errors in grouped(tensors, with_layer=True)
        ]
    rows += [(f"all {kind}", label, errors) for _, kind, label, errors in grouped(tensors, with_layer=False)]
    name_width, label_width = max(len(name) for name, _, _ in rows), max(len(label) for _, label, _ in rows)
    lines.append(f"{'':{name_width}}  {'':{label_width}}" + "".join(f"  {title:>11}" for title in _COLUMNS))
    for name, label, errors in rows:
        figures = f"  {errors.largest:11.4g}  {errors.rms:11.4g}  {errors.relative:11.4g}  {errors.cosine:11.8f}"
        lines.append(f"{name:{name_width}}  {label:{label_width}}{figures}")
    if total.nonfinite:
        lines.append(f"{total.nonfinite} weights of the source are NaN or infinite; they were left out")
    if total.scales:
        found = total.problems() or ["all finite, each in its group, nothing beside the matrices"]
        lines.append(f"{total.scales:,} scales: {', '.join(found)}")
    if total.empty_groups:
        lines.append(f"{total.empty_groups:,} groups are too small for a scale in f16: their weights are 0")
    return lines


def _difference_text(path: Path, other: Path, found: StoreDifference, full: bool) -> list[str]:
    lines = [f"{path} and {other}"]
    for title, pairs in (("made with", found.facts), ("cut", found.cut)):
        for name, (one, two) in pairs.items():
            values = "of other values" if isinstance(one, (list, dict)) else f"{one} and {two}"
            lines.append(f"  {title}: {name.replace('_', ' ')} {values}")
    lines += _format_lines(found, full)
    shown = 0
    for kind in found.kinds:
        if not (kind.differing or kind.absent):
            continue
        where = kind.kind if kind.layer is None else f"layer {kind.layer}  {kind.kind}"
        absent = f", {kind.absent} not on this machine" if kind.absent else ""
        lines.append(f"  {where}: {len(kind.differing)} of {kind.total} differ{absent}")
        room = 0 if len(kind.differing) == kind.total else max(0, _SHOWN - shown)
        names = kind.differing if full else kind.differing[:room]
        lines += [f"    {name}" for name in names]
        shown += len(names)
    if found.differing > shown:
        lines.append("  --full names all that differ")
    if found.equal:
        lines.append("equal: every unit, tensor and file" + (" that is here" if found.absent else ""))
    return lines


def _format_lines(found: StoreDifference, full: bool) -> list[str]:
    """How many matrices have other formats, and the first of them; nothing where the line before says it of all."""
    pairs = {(matrix.first, matrix.second) for matrix in found.formats}
    if not pairs or (len(pairs) == 1 and len(found.formats) == found.matrices):
        return []
    named = found.formats if full else found.formats[:_SHOWN]
    rest = len(found.formats) - len(named)
    return [
        f"  made with: other formats of {len(found.formats)} of {found.matrices} matrices",
        *(f"    {matrix.matrix}: {matrix.first} and {matrix.second}" for matrix in named),
        *([f"    and {rest} more"] if rest else []),
    ]


@contextmanager
def _progress(length: int, label: str) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
        yield bar.update
