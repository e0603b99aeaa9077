"""Where log lines go: stderr or a file, each with its rank."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import TextIO

from dist_moe.errors import UsageError


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Lines on stderr; where nobody takes them, they are dropped."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing: there is no other place to say it."""


class _LogFileHandler(logging.FileHandler):
    """Lines of a file; one that cannot be written (a full disk) ends the log, not the run, and is said once."""

    _failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, unless one failed before."""
        if not self._failed:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Say that the log ends here."""
        self._failed = True
        error = sys.exc_info()[1]
        reason = error.strerror if isinstance(error, OSError) else error
        with contextlib.suppress(OSError):
            sys.stderr.write(f"dist-moe: {self.baseFilename} cannot be written ({reason}): the log ends here\n")

    def close(self) -> None:
        """Close the file; what is still buffered may be lost with the rest."""
        with contextlib.suppress(OSError):
            super().close()


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
    handler: logging.Handler = _StderrHandler()
    if log_file is not None:
        path = Path(log_file.replace("%r", str(rank)))
        try:
            handler = _LogFileHandler(path, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--log-file: {path} cannot be written: {error.strerror}") from error
        level = min(level, logging.INFO)
    handler.setFormatter(logging.Formatter(f"%(asctime)s [rank {rank} on {host}] %(levelname)s %(message)s"))
    logger = logging.getLogger("dist_moe")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
