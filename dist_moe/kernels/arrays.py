"""From NumPy arrays to C pointers: the only place that checks dtype, shape, contiguity and writability."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dist_moe.kernels.formats import ALIGNMENT
from dist_moe.kernels.library import ffi

Array: TypeAlias = npt.NDArray[Any]
F32Array: TypeAlias = npt.NDArray[np.float32]
I32Array: TypeAlias = npt.NDArray[np.int32]
I64Array: TypeAlias = npt.NDArray[np.int64]
U8Array: TypeAlias = npt.NDArray[np.uint8]
U64Array: TypeAlias = npt.NDArray[np.uint64]
F64Array: TypeAlias = npt.NDArray[np.float64]
Pointer: TypeAlias = Any

_from_buffer = ffi.from_buffer


class ElementType:
    """One C element type: turns arrays into pointers after checking them."""

    def __init__(self, dtype: npt.DTypeLike, c_array: str) -> None:
        """Pair a NumPy dtype with a C array type such as "float[]"."""
        self._dtype = np.dtype(dtype)
        self._c_array = ffi.typeof(c_array)

    def read(self, array: Array, rows: int, *trailing: int) -> Pointer:
        """A pointer to at least `rows` rows of shape `trailing`; TypeError if the array is anything else."""
        if array.dtype != self._dtype or array.shape[1:] != trailing or array.shape[0] < rows:
            raise self._mismatch(array, rows, trailing)
        return _from_buffer(self._c_array, array)  # ValueError unless C-contiguous

    def write(self, array: Array, rows: int, *trailing: int) -> Pointer:
        """Like `read`, for an output: a read-only array raises BufferError or ValueError."""
        if array.dtype != self._dtype or array.shape[1:] != trailing or array.shape[0] < rows:
            raise self._mismatch(array, rows, trailing)
        return _from_buffer(self._c_array, array, True)

    def whole(self, array: Array) -> Pointer:
        """A pointer to all of an output of any shape; as `write`, but quicker."""
        if array.dtype != self._dtype:
            raise self._mismatch(array, len(array), array.shape[1:])
        return _from_buffer(self._c_array, array, True)

    def _mismatch(self, array: Array, rows: int, trailing: tuple[int, ...]) -> TypeError:
        expected = (f">={rows}", *map(str, trailing))
        found = tuple(map(str, array.shape))
        return TypeError(f"expected {self._dtype}[{', '.join(expected)}], got {array.dtype}[{', '.join(found)}]")


F32 = ElementType(np.float32, "float[]")
F64 = ElementType(np.float64, "double[]")
I8 = ElementType(np.int8, "int8_t[]")
I32 = ElementType(np.int32, "int32_t[]")
I64 = ElementType(np.int64, "int64_t[]")
U8 = ElementType(np.uint8, "uint8_t[]")
U64 = ElementType(np.uint64, "uint64_t[]")
U16 = ElementType(np.uint16, "uint16_t[]")


def address_of(array: Array) -> int:
    """The address of an array's first element, as `ChunkList` and `KvView` take it."""
    return int(array.__array_interface__["data"][0])  # a fifth of the time of array.ctypes


def aligned_empty(shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """An uninitialised C-contiguous array that begins on a 64-byte boundary."""
    shape = (shape,) if isinstance(shape, int) else shape
    element_bytes = np.dtype(dtype).itemsize
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.empty(count * element_bytes + ALIGNMENT, np.uint8)
    start = -address_of(raw) % ALIGNMENT
    return raw[start : start + count * element_bytes].view(dtype).reshape(shape)


def require_packed(packed: U8Array, length_bytes: int) -> None:
    """Check that `packed` is exactly one packed buffer of `length_bytes`, 64-byte aligned; TypeError if not."""
    if packed.dtype != np.uint8 or packed.shape != (length_bytes,):
        raise TypeError(f"expected {length_bytes} packed bytes, got {packed.dtype}{packed.shape}")
    if address_of(packed) % ALIGNMENT:
        raise TypeError(f"packed weights must begin on a {ALIGNMENT}-byte boundary")


def columns_pointer(rows_TR: F32Array, tokens: int, first: int, width: int) -> Pointer:
    """A pointer to column `first` of a writable [T, R], after checking that `width` columns fit."""
    stride = rows_TR.shape[1]
    if not 0 <= first <= first + width <= stride:
        raise TypeError(f"columns {first} ... {first + width} of a row of {stride}")
    return F32.write(rows_TR, tokens, stride) + first
