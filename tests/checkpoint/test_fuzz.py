"""Mutated files of every format: `make fuzz` feeds 10,000 to each parser, this a few hundred."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dist_moe

TESTS = Path(__file__).parents[1]
SCRIPT = TESTS / "helpers" / "fuzz.py"
PACKAGE = Path(dist_moe.__file__).parents[1]  # as this process has it: the source folder has no kernels


@pytest.mark.parametrize(
    "target", ["safetensors", "config", "gguf", "qw3w", "manifest", "mixed-manifest", "recipe", "calibration"]
)
def test_mutated_files_are_read_or_refused(target: str, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(PACKAGE), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), target, "--count", "500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{target}: 500 inputs of seed 1: ")
