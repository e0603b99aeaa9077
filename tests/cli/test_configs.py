"""Every example in configs/ is one that `run --config` reads, and the scripts in launch/ are valid shell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dist_moe.cli.config_file import read_config
from dist_moe.cli.logits import logits
from dist_moe.cli.run import run

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_read(path: Path) -> None:
    known = {str(parameter.name) for command in (run, logits) for parameter in command.params}
    assert read_config(path, known)


def test_the_demo_config_tells_a_story() -> None:
    command = [sys.executable, "-m", "dist_moe", "run", "--config", str(ROOT / "configs" / "demo.toml"), "-n", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("Once upon a time")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_valid_shell(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=20)
    assert path.stat().st_mode & 0o111


def test_there_are_examples() -> None:
    assert CONFIGS
    assert SCRIPTS
