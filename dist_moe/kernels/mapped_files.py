"""What is mapped where, so that a SIGBUS in the middle of a kernel can name file and unit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.errors import EnvironmentMismatch
from dist_moe.kernels.arrays import I64, Pointer
from dist_moe.kernels.library import ffi, lib

_LONGEST_PLACE = 4608  # the longest path, and a unit


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of a mapped file, and how to name what is in it.

    Attributes:
        address: Where it is mapped.
        bytes: Its size.
        label: A text with a % for each number: "layer 3, query head %", "layer 3, expert %, chunk %".
        units: int64, the unit in each row; empty if the tensor is named as a whole.
        units_per_expert: The first % is unit // this, the second one the remainder; 1 where only one number is named.
    """

    address: int
    bytes: int
    label: str
    units: npt.NDArray[np.int64]
    units_per_expert: int = 1


class MappedFile:
    """A mapped file that a SIGBUS can name, until `remove`, which must come before it is unmapped."""

    def __init__(self, path: str, address: int, length_bytes: int, tensors: Sequence[MappedTensor]) -> None:
        """Remember where a file's tensors are mapped.

        Args:
            path: The file's name for messages.
            address: Where its mapping begins.
            length_bytes: How long that is.
            tensors: Its tensors; a fault outside of them names the file alone.
        """
        self._kept: list[object] = [tensors]
        array = ffi.new("dm_mapped_tensor[]", max(1, len(tensors)))
        for to, tensor in zip(array, tensors, strict=False):
            to.first, to.bytes = ffi.cast("void *", tensor.address), tensor.bytes
            to.label = self._text(tensor.label)
            if len(tensor.units):
                to.row_bytes = tensor.bytes // len(tensor.units)
                to.unit_R = I64.read(tensor.units, len(tensor.units))
                to.units_per_expert = tensor.units_per_expert
                self._kept.append(to.unit_R)
        self._file: Pointer = ffi.new("dm_mapped_file *")
        self._file.path = self._text(path)
        self._file.first, self._file.bytes = ffi.cast("void *", address), length_bytes
        self._file.tensors, self._file.tensor_count = array, len(tensors)
        self._kept.append(array)
        lib.dm_mapped_file_add(self._file)

    def remove(self) -> None:
        """Forget the file."""
        if self._file is not None:
            lib.dm_mapped_file_remove(self._file)
            self._file = None

    def _text(self, text: str) -> Pointer:
        kept = ffi.new("char[]", os.fsencode(text))
        self._kept.append(kept)
        return kept


def describe_address(address: int) -> str | None:
    """The mapped file and the unit that an address belongs to, in words; None if it is in none."""
    out = ffi.new("char[]", _LONGEST_PLACE)
    if not lib.dm_describe_address(out, _LONGEST_PLACE, ffi.cast("void *", address)):
        return None
    return os.fsdecode(ffi.string(out))


def catch_bus_errors(before: str, delay_s: float, exit_code: int, abort_channel: int | None = None) -> None:
    """From now on a SIGBUS in a mapped file prints one line and ends the process.

    Args:
        before: How the line begins; file, unit and advice follow.
        delay_s: Waited before the line, so that of ranks that meet the same fault one prints and ends the others.
        exit_code: Of the process.
        abort_channel: The file on which the launcher takes PMI-1's abort command, or None.

    Raises:
        EnvironmentMismatch: The system refuses a signal handler.
    """
    channel = -1 if abort_channel is None else abort_channel
    if not lib.dm_catch_bus_errors(os.fsencode(before), int(delay_s * 1000), exit_code, channel):
        raise EnvironmentMismatch(f"a handler for SIGBUS cannot be installed: {os.strerror(ffi.errno)}")


def linger_after_crash(seconds: float) -> None:
    """From now on a process that crashes ends so much later, in which its other threads can speak.

    Raises:
        EnvironmentMismatch: The system refuses a signal handler.
    """
    if not lib.dm_linger_after_crash(int(seconds * 1000)):
        raise EnvironmentMismatch(f"a handler for SIGSEGV cannot be installed: {os.strerror(ffi.errno)}")
