"""What stands at a path: the system's refusal to say so becomes one sentence."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

from dist_moe.errors import UsageError

Kind = Literal["file", "directory", "pipe", "other"]


def kind_of(path: Path) -> Kind | None:
    """What stands at a path, links followed; None if there is nothing.

    `Path.is_file` and its like raise some of the system's errors and hide others, by version of Python.

    Raises:
        UsageError: The system does not say: a directory on the way is closed, or the name is too long.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  one call for all versions of Python
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be looked at ({error.strerror}): check the name and the permissions of its directories"
        ) from error
    return kind_of_mode(mode)


def kind_of_mode(mode: int) -> Kind:
    """What a `st_mode` stands for."""
    kinds: dict[int, Kind] = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe"}
    return kinds.get(stat.S_IFMT(mode), "other")


def is_file(path: Path) -> bool:
    """Whether a regular file stands at a path; raises UsageError as `kind_of`."""
    return kind_of(path) == "file"


def is_directory(path: Path) -> bool:
    """Whether a directory stands at a path; raises UsageError as `kind_of`."""
    return kind_of(path) == "directory"


def exists(path: Path) -> bool:
    """Whether anything stands at a path; raises UsageError as `kind_of`."""
    return kind_of(path) is not None


def read_bytes(path: Path) -> bytes:
    """The contents of a small file.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error
