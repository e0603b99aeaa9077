"""Recipes: which matrix gets which format, what is refused, and the options of shard that read them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dist_moe.checkpoint.hf_config import read_hf_config
from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.cli.main import execute
from dist_moe.errors import DistMoeError, UsageError
from dist_moe.kernels.formats import MatrixFormat, ScaleChoice, WeightFormat
from dist_moe.model_config import ModelConfig
from dist_moe.store.formats import ModelFormats
from dist_moe.store.layout import shard_command
from dist_moe.store.manifest import read_manifest
from dist_moe.store.placement_json import render_placement
from dist_moe.store.recipe_file import BUILT_IN, find_recipe, parse_recipe
from helpers.tiny_model import TinyModel
from helpers.tiny_store import ODD, contents, placement_of

F32, BF16, Q8, Q4 = (WeightFormat.F32, WeightFormat.BF16, WeightFormat.Q8, WeightFormat.Q4)
Q4_32, Q8_32 = MatrixFormat(Q4, 32), MatrixFormat(Q8, 32)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory = tmp_path_factory.mktemp("config")
    (directory / "config.json").write_text(json.dumps(TinyModel(layers=4, dense_layers=(1,)).config_json()))
    return read_hf_config(directory)


def formats(config: ModelConfig, text: str, group: int | None = None) -> ModelFormats:
    return parse_recipe(text, "r.toml").formats(config, group)


def test_built_in_recipes(config: ModelConfig) -> None:
    for name in set(BUILT_IN) - {"q4-mixed"}:
        fmt = WeightFormat.parse(name)
        for group in (32, 0):
            assert find_recipe(name).formats(config, group) == ModelFormats.uniform(config, fmt, group)
    mixed = find_recipe("q4-mixed").formats(config)
    assert mixed.label == "q4-mixed"
    assert {mixed.matrix(key, layer) for key in "qkvo" for layer in range(4)} | {mixed.lm_head} == {Q8_32}
    assert {found for layer in mixed.layers for found in layer.gate_up + layer.down} == {Q4_32}


def test_the_last_rule_that_fits_decides_each_of_format_and_group(config: ModelConfig) -> None:
    found = formats(
        config,
        """
        format = "q4"
        group = 64
        [[rule]]
        kind = ["experts", "o"]
        format = "q8"
        [[rule]]
        kind = "down"
        layers = "0-1,3-"
        group = 32
        [[rule]]
        experts = "2,4-"
        layers = 2
        format = "bf16"
        [[rule]]
        regex = 'layers\\.[02]\\.(experts\\.0\\.down|k)'
        format = "f32"
        """,
    )
    assert found.lm_head == found.matrix("q", 0) == found.matrix("v", 3) == MatrixFormat(Q4, 64)
    assert [found.matrix("k", layer).format for layer in range(4)] == [F32, Q4, F32, Q4]
    assert {found.matrix("o", layer) for layer in range(4)} == {MatrixFormat(Q8, 64)}
    assert [found.matrix("down", layer, 0) for layer in range(4)] == [
        MatrixFormat(F32, 0),
        MatrixFormat(Q8, 32),
        MatrixFormat(F32, 0),
        MatrixFormat(Q8, 32),
    ]
    assert [found.matrix("up", 2, e).format for e in range(8)] == [Q8, Q8, BF16, Q8, BF16, BF16, BF16, BF16]
    assert [found.matrix("down", 2, e).group for e in (1, 3)] == [64, 64]
    assert found.matrix("gate", 0, 7) == MatrixFormat(Q8, 64)


def test_a_group_given_beside_a_recipe_replaces_its_default_and_no_rule(config: ModelConfig) -> None:
    text = 'format = "q4"\ngroup = 64\n[[rule]]\nkind = "q"\ngroup = 32\n'
    assert [formats(config, text).matrix(key, 0).group for key in "qk"] == [32, 64]
    assert [formats(config, text, 128).matrix(key, 0).group for key in "qk"] == [32, 128]
    assert parse_recipe('format = "q4"\nscales = "mse"', "r").scales == ScaleChoice.MSE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format =", "r.toml: is not valid TOML"),
        ("", "r.toml: has no format for what no rule fits"),
        ('format = "q5"', "r.toml: unknown format 'q5'; choose one of f32, bf16, q8, q4"),
        ("format = [1]", r"r.toml: unknown format \[1\]"),
        ('format = "q4"\nscales = "max"', "unknown scales 'max'; choose one of absmax, mse"),
        ('format = "q4"\ngroup = 48', "group = 48; give one of 32, 64, 128, 0"),
        ('format = "q4"\ngroup = true', "group = True; give one of"),
        ('format = "q4"\nbits = 4', "unknown key 'bits'; known are format, group, scales, rule"),
        ('format = "q4"\nrule = 1', "rules are tables"),
        (
            'format = "q4"\n[[rule]]\nformat = "q8"',
            "rule 1: says not what it is for: give kind, layers, experts or regex",
        ),
        ('format = "q4"\n[[rule]]\nkind = "q"', "rule 1: changes nothing: give it a format or a group"),
        ('format = "q4"\n[[rule]]\nkind = "q"\nscales = "mse"', "rule 1: unknown key 'scales'; known are kind"),
        ('format = "q4"\n[[rule]]\nkind = "mlp"\nformat = "q8"', "rule 1: unknown kind 'mlp'; choose of q, k"),
        ('format = "q4"\n[[rule]]\nkind = 3\nformat = "q8"', "rule 1: unknown kind 3"),
        ('format = "q4"\n[[rule]]\nkind = []\nformat = "q8"', "rule 1: fits no matrix of this model"),
        ('format = "q4"\n[[rule]]\nlayers = "3-1"\nformat = "q8"', "rule 1: layers = '3-1'; give numbers and ranges"),
        ('format = "q4"\n[[rule]]\nlayers = ""\nformat = "q8"', "rule 1: layers = ''; give numbers"),
        ('format = "q4"\n[[rule]]\nlayers = "0-4"\nformat = "q8"', "this model has no layer 4; give 0 to 3"),
        ('format = "q4"\n[[rule]]\nexperts = "8-"\nformat = "q8"', "this model has no expert 8; give 0 to 7"),
        ('format = "q4"\n[[rule]]\nregex = "("\nformat = "q8"', r"rule 1: regex = '\(' is no regular expression"),
        (
            'format = "q4"\n[[rule]]\nregex = "q{99999999999}"\nformat = "q8"',
            "is no regular expression .the repetition",
        ),
        ('format = "q4"\n[[rule]]\nregex = "q"\nformat = "q8"', "rule 1: fits no matrix of this model; names are"),
        ('format = "q4"\n[[rule]]\nregex = ".*gate_up"\nformat = "q8"', r"layers.0.experts.0.gate \(or up, or down\)"),
        ('format = "q4"\n[[rule]]\nkind = "q"\nexperts = "0"\nformat = "q8"', "rule 1: fits no matrix"),
        (
            'format = "q4"\n[[rule]]\nregex = ".*gate"\nformat = "q8"',
            "r.toml: layers.0.experts.0 would get another format for gate than for up",
        ),
    ],
)
def test_each_mistake_is_one_sentence(config: ModelConfig, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        formats(config, text)
    assert "\n" not in str(error.value).replace(text, "")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    ODD.write(tmp_path / "odd")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_shard_with_a_recipe_and_again_like_its_store(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute(["shard", "odd", "--recipe", "q4-mixed", "--nodes", "2", "--quiet"])
    store = here / "odd-q4-mixed-2"
    manifest = read_manifest(store / "manifest.json")
    assert manifest.format_version == 4
    command = shard_command(manifest, store).split()
    assert command[:3] == ["dist-moe", "shard", "odd"]
    (store / "shard-00002-of-00002.safetensors").rename(here / "kept")
    execute([*command[1:], "--quiet"])
    assert (here / "kept").read_bytes() == (store / "shard-00002-of-00002.safetensors").read_bytes()
    execute(["inspect", str(store), "--verify"])
    assert "attention formats  q8, groups of 32: 12" in capsys.readouterr().out
    execute(["inspect", str(store), "--against", "odd"])


def test_a_dry_run_tells_the_sizes_that_follow_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["shard", "odd", "--recipe", "q4-mixed", "--nodes", "2", "-o", "s"]
    execute([*words, "--dry-run", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert not (here / "s").exists()
    execute([*words, "--dry-run"])
    text = capsys.readouterr().out
    assert not (here / "s").exists()
    execute([*words, "--quiet"])
    found = contents(here / "s")
    assert {node["file"]: node["file_bytes"] for node in told["nodes"]} == {
        name: len(data) for name, data in found.items() if name.startswith("shard")
    }
    assert told["common_bytes"] == len(found["common.safetensors"])
    assert told["total_bytes"] == sum(len(data) for name, data in found.items() if name != "manifest.json")
    assert told["text_bytes"] == len(found["config.json"])
    assert f"{told['total_bytes']:,} bytes\nno store was written" in text
    for node in told["nodes"]:
        assert node["node_bytes"] == node["file_bytes"] + told["common_bytes"]
        assert f"{node['node_bytes']:,} bytes  of which {node['file']}" in text
    assert [part["part"] for part in told["parts"]] == ["attention", "experts", "lm_head"]
    assert f"{told['bits_per_weight']:.3f} bits per weight" in text


def test_a_recipe_of_ours_is_no_directory_of_its_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "q8").mkdir()
    execute(["shard", "odd", "--recipe", "q8", "--dry-run", "--json"])
    assert json.loads(capsys.readouterr().out)["weights"] == "q8"


def test_a_dry_run_obeys_a_placement(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "p.json").write_text(render_placement(placement_of(Checkpoint.open(here / "odd"))))
    words = ["shard", "odd", "--placement", "p.json", "-o", "s"]
    execute([*words, "--dry-run", "--json"])
    told = json.loads(capsys.readouterr().out)
    execute([*words, "--quiet"])
    assert [node["file_bytes"] for node in told["nodes"]] == [
        len(data) for name, data in contents(here / "s").items() if name.startswith("shard")
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "q4", "--quant", "q4"], "--quant q4: the recipe says the formats"),
        (["--recipe", "q3"], "--recipe q3: is no file, and none of q4, q4-mixed, q8, bf16, f32"),
        (["--json"], "--json: belongs to --dry-run"),
        (["--recipe", "odd"], "odd: is a Hugging Face directory, not a store"),
    ],
)
def test_options_that_contradict_each_other(here: Path, words: list[str], message: str) -> None:
    with pytest.raises(DistMoeError, match=re.escape(message)):
        execute(["shard", "odd", *words])
    assert {path.name for path in here.iterdir()} == {"odd"}
