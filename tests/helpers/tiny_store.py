"""Stores made of tiny checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.store.convert import Conversion, convert
from dist_moe.store.plan import StoreOptions
from helpers.tiny_model import TinyModel

# Awkward on purpose: no dimension is a multiple of another's tile, the last chunk and vocabulary block are padded.
ODD = TinyModel(
    layers=3,
    model_dim=36,
    heads=6,
    kv_heads=3,
    head_dim=32,
    experts=5,
    experts_per_token=2,
    expert_hidden=180,
    dense_hidden=150,
    dense_layers=(1,),
    vocabulary=300,
    bias=True,
)


def ignore(done_bytes: int, total_bytes: int, what: str) -> None:
    """Progress that nobody watches."""


def run_convert(source: Checkpoint, directory: Path, **options: object) -> Conversion:
    """Make a store on one thread; `options` are those of StoreOptions."""
    return convert(source, directory, replace(StoreOptions(threads=1), **options), ignore)  # type: ignore[arg-type]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, hidden ones included."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
