"""How much private memory a conversion takes: a program that tests run in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from helpers.tiny_model import TinyModel

LARGE = TinyModel(
    layers=4,
    model_dim=512,
    heads=8,
    kv_heads=2,
    head_dim=64,
    experts=12,
    expert_hidden=384,
    vocabulary=6_000,
    dense_layers=(),
)
LARGE_BYTES = 120e6  # at least, in f32
_WATCHED = """
import re, sys
from pathlib import Path
from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from dist_moe.store.recut import recut

def anonymous_bytes():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

peak = 0
def watch(*_):
    global peak
    peak = max(peak, anonymous_bytes())

source, there = Path(sys.argv[1]), Path(sys.argv[2])
"""


def peak_bytes(opening: str, work: str, source: Path, there: Path, environment: Mapping[str, str]) -> int:
    """Private bytes that some work takes at most.

    Args:
        opening: A line of Python that makes `opened` of `source`; not counted.
        work: One that makes `there` of it, with `watch` for its progress.
        source, there: Paths.
        environment: Of the process.
    """
    program = f"{_WATCHED}opened = {opening}\nbefore = anonymous_bytes()\n{work}\nprint(peak - before)\n"
    words = [sys.executable, "-c", program, str(source), str(there)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True, env=dict(environment)).stdout)
