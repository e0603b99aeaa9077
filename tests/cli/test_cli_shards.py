"""The line that `dist-moe shard` prints runs as it stands, on stores of several shards and other numbers of ranks."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

WORDS = ["-p", "Once upon a time", "-n", "12", "--quiet", "--temperature", "0"]


def shard(nodes: int, directory: Path) -> list[str]:
    """Make a store of the demo; returns the words of the printed mpirun line."""
    command = [sys.executable, "-m", "dist_moe", "shard", "--nodes", str(nodes), "-o", str(directory / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=directory)
    return shlex.split(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("nodes", [2, 4])
def test_the_printed_line_runs_on_all_shards(nodes: int, tmp_path: Path, mpirun) -> None:
    printed = shard(nodes, tmp_path)
    assert printed[:4] == ["mpirun", "-n", str(nodes), "dist-moe"]
    alone = mpirun(1, sys.executable, "-m", "dist_moe", *printed[4:], *WORDS)
    assert alone.code == 0, alone.stderr
    for experts in ("auto", "sliced"):
        done = mpirun(nodes, sys.executable, "-m", "dist_moe", *printed[4:], *WORDS, "--experts", experts)
        assert done.code == 0, done.stderr
        assert done.stdout == alone.stdout
