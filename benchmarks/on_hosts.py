"""What the benchmarks over several hosts share: hosts made of network namespaces, the model, and running a command."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))

ARCHITECTURE = ROOT / "configs" / "qwen3-30b-a3b.toml"


def call(words: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[str, str]:
    """What a command prints, and its errors; it ends this program if it fails."""
    done = subprocess.run(words, env=os.environ | dict(environment or {}), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)}\n{done.stderr}")
    return done.stdout, done.stderr


def synthetic_bench(stores: Path, layers: int, quant: str) -> list[str]:
    """The begin of a command line of bench, over random weights that are written once into a directory of `stores`."""
    words = [sys.executable, "-m", "dist_moe", "bench", "--synthetic", str(ARCHITECTURE), "--quant", quant]
    store = stores / synthetic_store(layers, quant)
    return [*words, "--layers", str(layers), "--synthetic-dir", str(store), "-o", "json"]


def synthetic_store(layers: int, quant: str) -> str:
    """The name of that directory."""
    return f"{ARCHITECTURE.stem}-{layers}-{quant}"
