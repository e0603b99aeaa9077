"""Every model in configs/ is one that `bench --synthetic` can make, with as many parameters as were published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_moe.checkpoint.hf_config import read_hf_config
from dist_moe.checkpoint.model_toml import read_model_toml
from dist_moe.errors import CheckpointError
from dist_moe.model_config import ModelConfig
from dist_moe.store.model_json import model_to_json

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# Billions, in all and without embeddings, as the models' cards give them; None where they do not.
PUBLISHED = {
    "qwen3-30b-a3b": (30.5, 29.9),
    "qwen3-30b-a3b-instruct-2507": (30.5, 29.9),
    "qwen3-30b-a3b-thinking-2507": (30.5, 29.9),
    "qwen3-coder-30b-a3b-instruct": (30.5, 29.9),
    "qwen3-235b-a22b": (235, 234),
    "qwen3-235b-a22b-instruct-2507": (235, 234),
    "qwen3-235b-a22b-thinking-2507": (235, 234),
    "qwen3-coder-480b-a35b-instruct": (480, None),
    "qwen3-0.6b": (0.6, 0.44),
    "qwen3-1.7b": (1.7, 1.4),
    "qwen3-4b": (4.0, 3.6),
    "qwen3-8b": (8.2, 6.95),
    "qwen3-14b": (14.8, 13.2),
    "qwen3-32b": (32.8, 31.2),
}


def parameters(config: ModelConfig) -> tuple[int, int]:
    """Weights in all, and without embedding and lm_head."""
    D, P = config.model_dim, config.head_dim
    attention = 2 * D * P * (config.heads + config.kv_heads) + 2 * D + 2 * P
    total = D
    for layer in range(config.layers):
        total += attention + 3 * D * config.layer_hidden(layer) * config.layer_experts(layer)
        total += 0 if config.is_dense(layer) else D * config.experts
    tables = config.vocabulary * D * (1 if config.tied_embeddings else 2)
    return total + tables, total


def test_every_config_but_the_demo_has_an_architecture() -> None:
    assert {path.stem for path in CONFIGS.glob("*.toml")} == PUBLISHED.keys() | {"demo"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    for actual, published in zip(parameters(read_model_toml(CONFIGS / f"{name}.toml")), PUBLISHED[name], strict=True):
        if published is not None:
            assert actual / 1e9 == pytest.approx(published, rel=0.015 if published > 1 else 0.02)


def test_the_table_gives_what_config_json_gives(tmp_path: Path) -> None:
    """The same keys and values as JSON are the same model, bit for bit."""
    text = (CONFIGS / "qwen3-30b-a3b.toml").read_text().partition("[architecture]\n")[2]
    values = dict(line.split(" = ") for line in text.splitlines())
    (tmp_path / "config.json").write_text(json.dumps({key: json.loads(value) for key, value in values.items()}))
    expected = model_to_json(read_hf_config(tmp_path))
    assert model_to_json(read_model_toml(CONFIGS / "qwen3-30b-a3b.toml")) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("max_tokens = 3\n", r"expected a table \[architecture\]"),
        ("architecture = 3\n", r"expected a table \[architecture\]"),
        ("architecture = \n", "is not valid TOML"),
        ('[architecture]\nmodel_type = "llama"\n', r'\[architecture\]: model_type is "llama", expected "qwen3_moe"'),
        ('[architecture]\nmodel_type = "qwen3"\nhidden_act = "silu"\n', "num_hidden_layers is missing"),
    ],
)
def test_a_file_without_a_model_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "model.toml").write_text(text)
    with pytest.raises(CheckpointError, match=problem):
        read_model_toml(tmp_path / "model.toml")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.toml: cannot be read \(No such file or directory\)"):
        read_model_toml(tmp_path / "model.toml")
