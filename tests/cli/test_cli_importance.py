"""`shard` with a calibration: importance, recipes by bits, what is said and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.cli.main import execute
from dist_moe.demo import demo_model_directory
from dist_moe.errors import UsageError
from dist_moe.store.calibration_file import read_calibration, write_calibration
from dist_moe.store.layout import shard_command, source_note
from dist_moe.store.reader import Store
from helpers.tiny_model import TinyModel

STORY = "Once upon a time there was a dog who lived in a small red house. One day the dog found a big blue ball. " * 8
Shard = Callable[..., Path]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("calibration")
    (directory / "text").write_text(STORY)
    output = directory / "found"
    arguments = ["--quant", "bf16", "--sensitivity", "100", "-o", str(output)]
    execute(["calibrate", str(directory / "text"), *arguments])
    return output


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    def run(name: str, *arguments: str) -> Path:
        execute(["shard", "-o", str(tmp_path / name), "--quiet", *arguments])
        return tmp_path / name

    return run


def weights_of(store: Path) -> bytes:
    return next(store.glob("shard-*")).read_bytes()


def test_importance_changes_scales_and_is_noted(shard: Shard, calibration: Path, capsys) -> None:
    plain = shard("plain", "--quant", "q4", "--scales", "mse")
    weighted = shard("weighted", "--quant", "q4", "--importance", str(calibration))
    said = capsys.readouterr().err
    assert re.search(r"have fewer than 32 tokens and take the mean of their layer's experts", said)
    assert weights_of(plain) != weights_of(weighted)
    assert Store.open(weighted).manifest.importance
    assert Store.open(weighted).manifest.scales.label == "mse"


def test_a_recipe_by_bits(shard: Shard, calibration: Path, tmp_path: Path, capsys) -> None:
    recipe, options = tmp_path / "recipe.toml", ("--importance", str(calibration))
    auto = shard("auto", *options, "--recipe", "auto", "--target-bits", "4.6", "--write-recipe", str(recipe))
    said = capsys.readouterr().err
    formats, config = Store.open(auto).manifest.formats, Store.open(auto).config
    assert 4.59 < formats.bits_per_weight(config) <= 4.6
    assert f"auto: {formats.bits_per_weight(config):.4f} bits per weight (at most 4.6)" in said
    assert "layer  q" in said
    again = shard("again", *options, "--recipe", str(recipe))
    assert weights_of(again) == weights_of(auto)


def test_bits_for_bf16_throughout_need_no_scales(shard: Shard, calibration: Path) -> None:
    auto = shard("auto", "--importance", str(calibration), "--recipe", "auto", "--target-bits", "16")
    assert weights_of(auto) == weights_of(shard("bf16", "--quant", "bf16"))
    assert not Store.open(auto).manifest.importance


def test_the_command_that_makes_a_store_again_names_its_calibration(shard: Shard, calibration: Path) -> None:
    made = shard("made", "--quant", "q4", "--importance", str(calibration), "--nodes", "2")
    manifest = Store.open(made).manifest
    words = shard_command(manifest, made).replace("FILE", str(calibration)).split()
    kept = (made / "shard-00002-of-00002.safetensors").read_bytes()
    (made / "shard-00002-of-00002.safetensors").unlink()
    execute(["shard", *words[3:], "--quiet"])
    assert (made / "shard-00002-of-00002.safetensors").read_bytes() == kept
    assert f"for FILE what dist-moe calibrate wrote, {manifest.importance}" in source_note(manifest)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--recipe", "auto"), "--recipe auto: needs --importance FILE"),
        (("--target-bits", "5"), "--target-bits 5: belongs to --recipe auto"),
        (("--importance", "FILE", "--target-bits", "5"), "--target-bits 5: belongs to --recipe auto"),
        (("--importance", "FILE", "--recipe", "auto", "--quant", "q8"), "--quant q8: --recipe auto chooses that"),
        (("--importance", "FILE", "--recipe", "auto", "--group-size", "64"), "--group-size 64: --recipe auto chooses"),
        (("--importance", "FILE", "--recipe", "auto", "--scales", "absmax"), "--scales absmax: --recipe auto weighs"),
        (("--importance", "FILE", "--recipe", "auto", "--target-bits", "4"), "this model needs 4.2[0-9]+ at least"),
        (("--importance", "FILE", "--quant", "bf16"), "--importance weights the search for scales"),
        (("--importance", "FILE", "--scales", "absmax"), "--importance weights the search for scales"),
        (("--importance", "/nowhere"), "/nowhere: expected a calibration, but there is no such file"),
        (("--write-recipe", "FILE"), "is there already: name another file"),
    ],
)
def test_refusals(shard: Shard, calibration: Path, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        shard("out", *(str(calibration) if word == "FILE" else word for word in arguments))
    assert not (tmp_path / "out").exists()


def test_the_calibration_of_another_model_is_refused(shard: Shard, calibration: Path, tmp_path: Path) -> None:
    other = TinyModel().write(tmp_path / "tiny")
    with pytest.raises(UsageError, match=r"is a calibration of demo \(fingerprint [0-9a-f]{12}\), not of tiny"):
        shard("out", str(other), "--importance", str(calibration))


def test_wrong_shapes_are_refused(shard: Shard, calibration: Path, tmp_path: Path) -> None:
    found = read_calibration(calibration)
    object.__setattr__(found.layers[1], "hidden_EF", found.layers[1].hidden_EF[:, 1:])
    write_calibration(tmp_path / "wrong", found)
    with pytest.raises(UsageError, match=r"layers.1.hidden has shape \[16, 63\], expected \[16, 64\]"):
        shard("out", str(demo_model_directory()), "--importance", str(tmp_path / "wrong"))


def test_a_model_that_cannot_be_quantized_is_refused_before_its_calibration_is_read(
    shard: Shard, calibration: Path, tmp_path: Path
) -> None:
    narrow, recipe = TinyModel(head_dim=48).write(tmp_path / "narrow"), tmp_path / "recipe.toml"
    options = ("--recipe", "auto", "--target-bits", "16", "--write-recipe", str(recipe))
    wanted = f"--recipe auto: {narrow}: head_dim 48 is not a multiple of 32, .*: use --quant bf16 or --quant f32"
    with pytest.raises(UsageError, match=wanted) as caught:
        shard("out", str(narrow), "--importance", str(calibration), *options)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match=wanted):  # before a calibration is asked for
        shard("out", str(narrow), "--recipe", "auto")
    assert not recipe.exists()
    assert not (tmp_path / "out").exists()
