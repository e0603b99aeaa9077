"""Where log lines go: stderr or a file, each with its rank."""

from __future__ import annotations

import logging
from pathlib import Path

from dist_moe.errors import UsageError


def start_logging(verbose: int, log_file: str | None, rank: int, host: str) -> None:
    """Send the package's log lines somewhere.

    Args:
        verbose: 0 warnings, 1 what happens, 2 details.
        log_file: Appended to; `%r` in its name becomes the rank. None is stderr.
        rank: This process's rank.
        host: Its host, for the lines of a file.

    Raises:
        UsageError: The file cannot be written.
    """
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler: logging.Handler = logging.StreamHandler()
    if log_file is not None:
        path = Path(log_file.replace("%r", str(rank)))
        try:
            handler = logging.FileHandler(path, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--log-file: {path} cannot be written: {error.strerror}") from error
        level = min(level, logging.INFO)
    handler.setFormatter(logging.Formatter(f"%(asctime)s [rank {rank} on {host}] %(levelname)s %(message)s"))
    logger = logging.getLogger("dist_moe")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
