"""Token ids that a user wrote: a list on the command line, a text file or a .npy file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format

from dist_moe import files
from dist_moe.cli.text_files import read_text
from dist_moe.errors import UsageError

_LIST = re.compile(r"[\d\s,+-]+")


def parse_ids(text: str, origin: str) -> list[int]:
    """The integers of a list separated by commas or blanks.

    Args:
        text: For instance `1,2,3`.
        origin: The option or file that it came from, for error messages.

    Raises:
        UsageError: Something in it is not an integer, or there is none.
    """
    words = text.replace(",", " ").split()
    for word in words:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", word):
            raise UsageError(f"{origin}: expected token ids like 1,2,3, found {word[:40]!r}")
    if not words:
        raise UsageError(f"{origin}: there is no token id in it: give at least one")
    return [int(word) for word in words]


def read_ids(value: str, option: str) -> list[int]:
    """The ids of an option that takes a list or a file (`.npy` of integers, or text).

    Raises:
        UsageError: The file cannot be read, or something in it is not a token id.
    """
    if _LIST.fullmatch(value):
        return parse_ids(value, option)
    path = Path(value)
    if not files.exists(path):
        raise UsageError(f"{option}: {value!r} is neither a list of token ids like 1,2,3 nor a file")
    if path.suffix != ".npy":
        return parse_ids(read_text(path, option), str(path))
    try:
        with path.open("rb") as stream:
            ids_T = npy_format.read_array(stream, allow_pickle=False)
    except OSError as error:
        raise UsageError(f"{option}: {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not a file of token ids: {error}") from error
    if ids_T.ndim != 1 or not np.issubdtype(ids_T.dtype, np.integer) or ids_T.size == 0:
        raise UsageError(f"{path}: expected a one-dimensional array of integers, found {ids_T.dtype} {ids_T.shape}")
    return [int(token) for token in ids_T]


def require_ids(ids: Sequence[int], vocabulary: int, origin: str) -> None:
    """Refuse ids that the model does not have.

    Raises:
        UsageError: An id is negative or not below `vocabulary`; the first such id and its place are named.
    """
    for place, token in enumerate(ids):
        if not 0 <= token < vocabulary:
            raise UsageError(
                f"{origin}: token id {token} at position {place} is not in the vocabulary, 0 to {vocabulary - 1}"
            )
