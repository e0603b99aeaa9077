"""dist-moe with an accident: `python corrupted_job.py ACCIDENT RANK dist-moe's arguments...`.

Accidents, on the given rank:
    none
    residual=STEP      a bit of the residual flips in that step, counted from 1
    flip=FILE@BYTE     a byte of the file changes once the engine has mapped it
    cut=FILE@BYTE      the file is cut to so many bytes once the engine has mapped it
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dist_moe.cli.main import main
from dist_moe.engine.runtime import Runtime
from dist_moe.model.step import Step
from dist_moe.model.transformer import Transformer
from dist_moe.parallel.launcher import detect_launcher


def flip_residual(wanted_step: int) -> None:
    """One bit, after the attention of layer 0."""
    original, steps = Transformer.run_layers, itertools.count(1)

    def flip(layer: int, half: str, x_TD: np.ndarray) -> None:
        if (layer, half) == (0, "attention"):
            x_TD.view(np.uint8)[-1, 2] ^= 0x10

    def run_layers(self: Transformer, step: Step) -> None:
        self.observer = flip if next(steps) == wanted_step else None
        original(self, step)

    Transformer.run_layers = run_layers  # type: ignore[method-assign]


def harm_when_mapped(path: Path, byte: int, cut: bool) -> None:
    """Change the file under the mapping of a ready engine."""
    original = Runtime.__init__

    def init(self: Runtime, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        if cut:
            os.truncate(path, byte)
            return
        with path.open("r+b") as file:
            file.seek(byte)
            found = file.read(1)[0]
            file.seek(byte)
            file.write(bytes([found ^ 1]))

    Runtime.__init__ = init  # type: ignore[method-assign]


if __name__ == "__main__":
    accident, _, where = sys.argv.pop(1).partition("=")
    if detect_launcher(os.environ).rank == int(sys.argv.pop(1)):
        if accident == "residual":
            flip_residual(int(where))
        elif where:
            name, _, at = where.rpartition("@")
            harm_when_mapped(Path(name), int(at), accident == "cut")
    sys.exit(main())
