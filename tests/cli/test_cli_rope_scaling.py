"""`--rope-scaling` for real: the bits of a model whose config.json says it, a longer context, and refusals."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import launching

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "base"
Run = Callable[..., launching.Finished]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    environment = {"DIST_MOE_CACHE": str(tmp_path_factory.mktemp("cache")), "DIST_MOE_THREADS": "1"}

    def run(*arguments: object, model: Path = GOLDEN, ranks: int = 1) -> launching.Finished:
        program = (sys.executable, "-m", "dist_moe", "run", "-m", model, "--quant", "f32", "--ignore-eos")
        return launching.mpirun(ranks, *map(str, (*program, *arguments)), env=environment)

    return run


def limit() -> int:
    found: int = json.loads((GOLDEN / "config.json").read_text())["max_position_embeddings"]
    return found


def test_the_bits_are_those_of_a_config_that_says_yarn(run: Run, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "yarn")
    config = json.loads((tmp_path / "yarn" / "config.json").read_text())
    assert not config.get("rope_scaling")
    config.pop("rope_parameters", None)
    base = json.loads((GOLDEN / "config.json").read_text())
    theta = base.get("rope_theta") or base["rope_parameters"]["rope_theta"]
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": limit()}
    config |= {"rope_theta": theta, "rope_scaling": scaling}
    (tmp_path / "yarn" / "config.json").write_text(json.dumps(config))
    prompt = ("--prompt-ids", "5,6,7,8,9,10", "-n", "9", "--temperature", "0")
    rows = []
    for name, model, more in (
        ("plain", GOLDEN, ()),
        ("config", tmp_path / "yarn", ()),
        ("option", GOLDEN, ("--rope-scaling", "yarn:4")),
    ):
        done = run(*prompt, *more, "--logits", tmp_path / f"{name}.npy", model=model, ranks=2)
        assert done.code == 0, done.output
        rows.append((tmp_path / f"{name}.npy").read_bytes())
    assert rows[1] == rows[2] != rows[0]
    assert f"up to {4 * limit()} positions; all prompts, short ones too, give other numbers" in done.stderr


def test_the_context_may_be_longer(run: Run) -> None:
    longer = ("--prompt-ids", "1,2,3", "-n", "1", "--ctx", 2 * limit())
    done = run(*longer)
    assert done.code == 2, done.output
    assert f"--ctx {2 * limit()} is more than the model's maximum of {limit()} positions" in done.stderr
    assert run(*longer, "--rope-scaling", "yarn:2").code == 0


def test_a_prompt_cache_knows_the_scaling(run: Run, tmp_path: Path) -> None:
    prompt = ("--prompt-ids", "1,2,3,4", "-n", "2", "--prompt-cache", tmp_path / "p")
    assert run(*prompt, "--rope-scaling", "yarn:4").code == 0
    assert run(*prompt, "--rope-scaling", "yarn:4").code == 0
    done = run(*prompt)
    assert done.code == 2, done.output
    assert "was saved with rotary settings YaRN" in done.stderr
    assert "give the same --rope-scaling" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("linear:2", "--rope-scaling: expected yarn:FACTOR or yarn:FACTOR:ORIGINAL_POSITIONS"),
        ("yarn:1", "with a factor above 1, found 'yarn:1'"),
        ("yarn:2:9999999", "but the model has"),
    ],
)
def test_bad_values_are_one_line(run: Run, text: str, words: str) -> None:
    done = run("--prompt-ids", "1,2", "--rope-scaling", text, ranks=2)
    assert done.code == 2, done.output
    assert words in done.stderr, done.output
    assert done.stderr.count("dist-moe: error:") == 1, done.output
