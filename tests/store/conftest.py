"""The odd checkpoint, and stores of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from helpers.tiny_store import ODD, run_convert


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(ODD.write(tmp_path / "odd"))


@pytest.fixture
def make_store(tmp_path: Path, checkpoint: Checkpoint) -> Callable[..., Path]:
    """Make a store of the odd checkpoint and return its directory."""

    def make(name: str = "store", **options: object) -> Path:
        run_convert(checkpoint, tmp_path / name, **options)
        return tmp_path / name

    return make
