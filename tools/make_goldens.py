"""Remakes tests/golden from transformers; see tests/golden/README.md for the environment.

python tools/make_goldens.py            everything but the demo model
python tools/make_goldens.py --demo     only tests/golden/demo.npz, from dist_moe/demo/model
python tools/make_goldens.py --check    loads what was written afresh and compares
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ATEN_CPU_CAPABILITY"] = "default"  # torch's AVX2/AVX-512 pow rounds inv_freq differently, by one ulp

import torch
from goldens import check, demo, parts, rope, specs, traces
from goldens.build import write_model
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
DEMO = ROOT / "dist_moe" / "demo"


def make_models(names: list[str]) -> None:
    """Writes the tiny checkpoints and their goldens; no names means all."""
    for spec in specs.SPECS:
        if names and spec.name not in names:
            continue
        directory = GOLDEN / "models" / spec.name
        write_model(spec, directory)
        arrays = traces.write_golden(directory, spec.tokens)
        margin, gap = arrays["min_margin"], min(arrays["ids_router_gap"], arrays["greedy_router_gap"])
        print(f"{spec.name:16} margin {margin:.2e}  router gap {gap:.2e}", flush=True)


def main() -> None:
    """Parses the command line and makes what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--demo", action="store_true", help="only the golden of the demo model")
    what.add_argument("--check", action="store_true", help="load everything afresh and compare")
    what.add_argument("--parts", action="store_true", help="only the goldens of single modules")
    what.add_argument("--models", nargs="*", metavar="NAME", help="only these models (none named: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.check:
        return check.check_all(GOLDEN, DEMO)
    if options.demo:
        return demo.write_demo(DEMO, GOLDEN / "demo.npz")
    if options.models is None:
        parts.write_parts(GOLDEN)
        rope.write_rope(GOLDEN)
    if not options.parts:
        make_models(options.models or [])
    return None


if __name__ == "__main__":
    main()
