"""--threads-file: threads per rank by host name, for hosts of unequal size."""

from __future__ import annotations

import sys
from pathlib import Path

from dist_moe.engine.opening import threads_of_host
from dist_moe.engine.start.settings import MOST_THREADS
from dist_moe.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["read_threads_file", "threads_of_host"]


def read_threads_file(path: str | None) -> dict[str, int]:
    """Threads of each rank by host name; nothing without a file.

    Raises:
        UsageError: The file cannot be read, or is not TOML of `host = number`.
    """
    if path is None:
        return {}
    try:
        entries = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--threads-file: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--threads-file: {path} is not valid TOML: {error}") from error
    for host, threads in entries.items():
        if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
            hint = f'; quote a name with dots: "{host}.example" = 8' if isinstance(threads, dict) else ""
            raise UsageError(
                f"--threads-file: {path}: {host}: expected a number of threads from 1 to {MOST_THREADS}, "
                f"found {threads!r}{hint}"
            )
    return entries
