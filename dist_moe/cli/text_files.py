"""Texts that a user wrote, from a file, a pipe or stdin: UTF-8, with an end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from dist_moe import files
from dist_moe.errors import UsageError

# Thousands of times a context's tokens: what is longer is the wrong file, or has no end.
LARGEST_TEXT_BYTES = 64 << 20


def read_text(path: Path, option: str) -> str:
    """The text of a regular file or pipe, without a byte order mark.

    Args:
        path: The file; `/dev/stdin` and `<(command)` are pipes.
        option: Which option named it, for error messages.

    Raises:
        UsageError: It cannot be read, is a directory or device, is too large, or is not UTF-8.
    """
    try:
        if files.kind_of_mode(os.stat(path).st_mode) == "other":  # noqa: PTH116
            raise UsageError(f"{option}: {path} is a device: give a file or a pipe")
        with path.open("rb") as stream:
            return decode(read_limited(stream, f"{option}: {path}"), f"{option}: {path}")
    except OSError as error:
        raise UsageError(f"{option}: {path} cannot be read: {error.strerror or error}") from error


def read_limited(stream: BinaryIO, origin: str) -> bytes:
    """All bytes of a stream.

    Raises:
        UsageError: There are more than LARGEST_TEXT_BYTES of them.
    """
    data = stream.read(LARGEST_TEXT_BYTES + 1)
    if len(data) > LARGEST_TEXT_BYTES:
        raise UsageError(f"{origin} has more than {LARGEST_TEXT_BYTES >> 20} MB of text: give less")
    return data


def decode(data: bytes, origin: str) -> str:
    """UTF-8 bytes as text; Windows editors put a byte order mark before it, which is no part of it.

    Raises:
        UsageError: They are not UTF-8.
    """
    try:
        return data.decode("utf-8").removeprefix("\N{BYTE ORDER MARK}")
    except UnicodeDecodeError as error:
        raise UsageError(f"{origin}: not valid UTF-8 at byte {error.start}: convert it to UTF-8") from error
