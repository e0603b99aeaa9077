"""Stores whose scales are of least error, and bytes that do not depend on threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.errors import StoreError
from dist_moe.kernels import ScaleChoice, WeightFormat
from dist_moe.store.layout import shard_command
from dist_moe.store.manifest import parse_manifest, read_manifest
from helpers.tiny_store import contents, run_convert


@pytest.mark.parametrize("group_size", [32, 0])
@pytest.mark.parametrize("scales", list(ScaleChoice))
def test_files_are_the_same_on_any_number_of_threads(
    make_store: Callable[..., Path], scales: ScaleChoice, group_size: int
) -> None:
    one = make_store("one", nodes=2, scales=scales, group_size=group_size)
    three = make_store("three", nodes=2, scales=scales, group_size=group_size, threads=3)
    assert contents(one) == contents(three)


def test_the_manifest_says_how_scales_were_chosen(make_store: Callable[..., Path]) -> None:
    plain, searched = make_store("plain", scales=ScaleChoice.ABSMAX), make_store("searched")
    assert '"scales"' not in (plain / "manifest.json").read_text()
    assert read_manifest(plain / "manifest.json").format_version == 1
    manifest = read_manifest(searched / "manifest.json")
    assert (manifest.format_version, manifest.scales) == (3, ScaleChoice.MSE)
    assert parse_manifest(manifest.render(), "again").recipe() == manifest.recipe()
    assert contents(plain) != contents(searched)
    assert "--scales absmax" in shard_command(read_manifest(plain / "manifest.json"), plain)
    assert "--scales" not in shard_command(manifest, searched)


def test_q4_is_searched_and_q8_is_not_unless_told(make_store: Callable[..., Path]) -> None:
    assert contents(make_store("default")) == contents(make_store("told", scales=ScaleChoice.MSE))
    q8 = make_store("q8", format=WeightFormat.Q8)
    assert contents(q8) == contents(make_store("q8-told", format=WeightFormat.Q8, scales=ScaleChoice.ABSMAX))


def test_formats_without_scales_have_no_choice(make_store: Callable[..., Path]) -> None:
    options = {"format": WeightFormat.BF16}
    assert contents(make_store("plain", **options)) == contents(make_store("mse", **options, scales=ScaleChoice.MSE))


def test_another_choice_of_scales_is_another_store(checkpoint: Checkpoint, make_store: Callable[..., Path]) -> None:
    there = make_store("store", scales=ScaleChoice.ABSMAX)
    with pytest.raises(StoreError, match="scales absmax, not mse"):
        run_convert(checkpoint, there)
