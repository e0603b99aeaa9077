"""dist-moe export: chosen tensors of a store, decoded, for other programs."""

from __future__ import annotations

import math
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from dist_moe.cli.values import OneOf, PathName, refuse
from dist_moe.errors import UsageError
from dist_moe.parallel.launcher import detect_launcher

_ALL = "all"
_LARGEST = 1 << 20


class _Numbers(click.types.StringParamType):
    """Whole numbers and ranges with commas between them, or the word `all`; the value stays a text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check."""
        text = super().convert(value, param, ctx).replace(" ", "")
        if text != _ALL and not re.fullmatch(r"[0-9]{1,6}(-[0-9]{1,6})?(,[0-9]{1,6}(-[0-9]{1,6})?)*", text):
            refuse("numbers like 0,5 or 0-3, or the word all", value, param, ctx)
        return text


@click.command("export")
@click.argument("store", metavar="STORE", type=PathName())
@click.option("--layer", metavar="0,5|0-3|all", type=_Numbers(), help="Layers.  [default: all, if --part is given]")
@click.option(
    "--part",
    "parts",
    type=OneOf(["attn", "mlp", "norms", "router", "all"]),
    multiple=True,
    help="What of each layer; may be repeated.  [default: all, if --layer is given]",
)
@click.option(
    "--experts",
    metavar="0,5|all",
    type=_Numbers(),
    help="Experts of each layer's MLP; a dense MLP is taken whole.  [default: all]",
)
@click.option("--lm-head", "--lm_head", is_flag=True, help="The output matrix, too.")
@click.option("--embedding", "--embeds", is_flag=True, help="The embedding, too.")
@click.option("--all", "everything", is_flag=True, help="The whole model.")
@click.option(
    "--dtype",
    type=OneOf(["f32", "bf16"]),
    default="f32",
    show_default=True,
    help="f32 keeps every value of every format; bf16 rounds those of q8 and q4.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE|DIR",
    required=True,
    type=PathName(),
    help="FILE.safetensors; FILE.npy for a single tensor; any other name is a directory of .npy files.",
)
def export(
    store: str,
    layer: str | None,
    parts: tuple[str, ...],
    experts: str | None,
    lm_head: bool,
    embedding: bool,
    everything: bool,
    dtype: str,
    output: str,
) -> None:
    """Write chosen tensors of STORE as numbers, under their Hugging Face names, one tensor per expert.

    What q8 and q4 stand for is scale x integer. Each unit is compared with its checksum; shards that the chosen tensors
    do not need may be elsewhere.
    """
    if not detect_launcher(os.environ).is_first:
        return
    from dist_moe.kernels import Kernels, WeightFormat
    from dist_moe.store.decoded import DecodedStore
    from dist_moe.store.export import PARTS, Selection, selected_names
    from dist_moe.store.export import export as write
    from dist_moe.store.reader import Store

    if everything and (layer or parts or experts):
        raise UsageError("--all is the whole model: leave out --layer, --part and --experts, or --all")
    in_layers = everything or layer is not None or bool(parts) or experts is not None
    default = ("mlp",) if experts is not None and layer is None else PARTS
    chosen = tuple(parts) if parts and _ALL not in parts else PARTS if parts or everything else default
    if experts is not None and "mlp" not in chosen:
        raise UsageError("--experts: experts belong to --part mlp; add it, or leave out --experts")
    selection = Selection(
        layers=_numbers(layer),
        parts=chosen if in_layers else (),
        experts=_numbers(experts),
        lm_head=lm_head or everything,
        embedding=embedding or everything,
    )
    opened = Store.open(store, with_text=False)
    names = selected_names(opened.config, selection)
    with Kernels(len(os.sched_getaffinity(0))) as kernels:
        decoded = DecodedStore(opened, kernels)
        with _bar(sum(math.prod(decoded.shape(name)) for name in names)) as bar:
            done = write(decoded, names, Path(output), WeightFormat.parse(dtype), bar.update if bar else _ignore)
    for name in done.tensors:
        click.echo(name)
    click.echo(f"{output}: {len(done.tensors)} tensors in {dtype}, {done.total_bytes:,} bytes", err=True)


def _numbers(text: str | None) -> tuple[int, ...] | None:
    """The numbers of a text, ascending; None for all."""
    if text is None or text == _ALL:
        return None
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= {*range(int(first), int(last or first) + 1)}
    return tuple(sorted(found))


def _bar(values: int) -> Any:
    """A progress bar on a terminal, nothing elsewhere."""
    return click.progressbar(length=values, label="writing", file=sys.stderr) if sys.stderr.isatty() else nullcontext()


def _ignore(count: int) -> None:
    """Progress that nobody watches."""
