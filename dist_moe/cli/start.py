"""The console script's first lines: Ctrl-C is handled before anything slow is imported."""

from __future__ import annotations

import os
import sys

INTERRUPTED = 130


def main() -> int:
    """Run the command line; returns the exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with it closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    try:
        from dist_moe.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("dist-moe: interrupted\n")
        return INTERRUPTED
