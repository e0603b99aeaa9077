"""Fixtures of the kernel tests: every ISA level of this machine, 1 to 3 threads, guarded and poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from dist_moe.kernels import NO_FAULT, Kernels, Operand, WeightFormat, buffers, isa_levels, packed_bytes

GUARD_BYTES = 256
GUARD = 0xFF  # NaN in f32, f16 and bf16, so that a stray read shows


class Bench:
    """Arrays in guarded memory. Outputs begin as NaN (integers as 0xAA); guards are checked when the test ends."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self._guarded: list[tuple[np.ndarray, int, int]] = []

    def empty(self, shape: int | tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        """A poisoned 64-byte aligned array between two guards."""
        dtype, shape = np.dtype(dtype), (shape,) if isinstance(shape, int) else shape
        length = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        raw = np.full(length + 2 * GUARD_BYTES + 64, GUARD, np.uint8)
        start = GUARD_BYTES + -(raw.ctypes.data + GUARD_BYTES) % 64
        self._guarded.append((raw, start, start + length))
        view = raw[start : start + length]
        if dtype.kind != "f":
            view.fill(0xAA)
        return view.view(dtype).reshape(shape)

    def of(self, values: np.ndarray) -> np.ndarray:
        """A guarded copy."""
        values = np.asarray(values)
        copy = self.empty(values.shape, values.dtype)
        copy[...] = values
        return copy

    def floats(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Guarded normal random float32."""
        return self.of((self.rng.standard_normal(shape) * scale).astype(np.float32))

    def wild(self, *shape: int) -> np.ndarray:
        """Guarded finite float32 of every magnitude: denormals, zeros of both signs, up to 1e30."""
        x = self.rng.standard_normal(shape) * 10.0 ** self.rng.uniform(-44, 30, shape)
        x *= self.rng.choice([0.0, -0.0, 1.0], shape, p=[0.05, 0.05, 0.9])
        return self.of(x.astype(np.float32))

    def faults(self, tokens: int) -> np.ndarray:
        """No fault yet, for every token."""
        return self.of(np.full(tokens, NO_FAULT, np.int32))

    def packed(
        self, kernels: Kernels, weights: np.ndarray, fmt: WeightFormat, group: int, scale: np.ndarray | None = None
    ) -> np.ndarray:
        """A packed matrix in guarded memory, every weight of which could be represented."""
        packed = self.empty(packed_bytes(fmt, *weights.shape, group), np.uint8)
        assert kernels.pack(packed, weights, scale, fmt, group) == 0
        return packed

    def operand(self, kernels: Kernels, x: np.ndarray, quantized: bool) -> Operand:
        """An operand of x, quantized from poisoned memory if asked for."""
        operand = Operand(len(x), x.shape[1], quantized)
        operand.x_TC[...] = x
        for array in (operand.q_TC, operand.scale_TG, operand.sum_TG):
            array.view(np.uint8).fill(0xAA)
        fault = self.faults(len(x))
        kernels.quantize(operand, fault, len(x), 0)
        assert (fault == NO_FAULT).all()
        return operand

    def check_guards(self) -> None:
        """Fail if anything around an array has changed."""
        for raw, start, stop in self._guarded:
            assert (raw[:start] == GUARD).all(), "written before an array"
            assert (raw[stop:] == GUARD).all(), "written behind an array"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Guarded memory; operands made in the test lie in it too."""
    bench = Bench(20240607)
    monkeypatch.setattr(buffers, "aligned_empty", bench.empty)
    yield bench
    bench.check_guards()


@pytest.fixture(scope="session")
def portable() -> Iterator[Kernels]:
    """The build that defines the bits, on one thread."""
    with Kernels(threads=1, isa="portable") as kernels:
        yield kernels


@pytest.fixture(scope="session", params=[(isa, threads) for isa in isa_levels() for threads in (1, 2, 3)], ids=str)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Every ISA level that this machine can run, with 1, 2 and 3 threads."""
    isa, threads = request.param
    with Kernels(threads=threads, isa=isa) as kernels:
        yield kernels


def assert_same_bits(found: object, expected: object) -> None:
    """Arrays, or tuples of arrays, equal bit for bit."""
    found, expected = (value if isinstance(value, tuple) else (value,) for value in (found, expected))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        one, other = np.ascontiguousarray(one), np.ascontiguousarray(other)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        np.testing.assert_array_equal(one.view(f"u{one.itemsize}"), other.view(f"u{other.itemsize}"))


@pytest.fixture
def same_bits() -> object:
    """The comparison of the contract: `==` on the bits."""
    return assert_same_bits
