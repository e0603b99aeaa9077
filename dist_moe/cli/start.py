"""The console script's first lines: Ctrl-C and a killed launcher are seen to before anything slow is imported."""

from __future__ import annotations

import os
import sys

from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.lifeline import hold_lifeline

INTERRUPTED = 130


def main() -> int:
    """Run the command line; returns the exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # started with it closed
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    try:
        hold_lifeline(detect_launcher(os.environ), os.environ)
        from dist_moe.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("dist-moe: interrupted\n")
        return INTERRUPTED
