"""The console script's first lines: Ctrl-C is handled before anything slow is imported."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from dist_moe.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("dist-moe: interrupted\n")
        return INTERRUPTED
