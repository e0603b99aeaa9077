"""The context: ISA levels, threads, the caller's floating-point environment, the self-test."""

import ctypes
import mmap
import platform

import numpy as np
import pytest

from dist_moe.errors import UsageError
from dist_moe.kernels import Kernels, MatrixFormat, MatrixList, SamplingParameters, WeightFormat, isa_levels

# The control register that turns flush-to-zero on: code to read and to write it, and its bits that round towards zero,
# flush denormals and mask all exceptions.
MACHINES = {
    # stmxcsr [rdi]; ret / ldmxcsr [rdi]; ret
    "x86_64": (b"\x0f\xae\x1f\xc3", b"\x0f\xae\x17\xc3", 0xFFC0),
    # mrs x1, fpcr; str w1, [x0]; ret / ldr w1, [x0]; msr fpcr, x1; ret
    "aarch64": (
        bytes.fromhex("01443bd5 010000b9 c0035fd6"),
        bytes.fromhex("010040b9 01441bd5 c0035fd6"),
        0x01C00000,
    ),
}


class ControlRegister:
    """MXCSR or FPCR of the calling thread, through a few bytes of machine code."""

    def __init__(self) -> None:
        if platform.machine() not in MACHINES:
            pytest.skip(f"no code for {platform.machine()}")
        read, write, self.hostile = MACHINES[platform.machine()]
        try:
            self._page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        except OSError:
            pytest.skip("this system allows no executable memory")
        self._page[: len(read)] = read
        self._page[64 : 64 + len(write)] = write
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        if platform.machine() == "aarch64":  # instruction caches do not see stores by themselves
            ctypes.CDLL("libgcc_s.so.1").__clear_cache(ctypes.c_void_p(start), ctypes.c_void_p(start + 128))
        signature = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint32))
        self._read, self._write = signature(start), signature(start + 64)

    def get(self) -> int:
        """The register without the flags of past exceptions (the lowest six bits), which NumPy clears."""
        value = ctypes.c_uint32()
        self._read(ctypes.byref(value))
        return value.value & ~0x3F

    def set(self, value: int) -> None:
        self._write(ctypes.byref(ctypes.c_uint32(value)))


@pytest.fixture
def register():
    """The control register, put back when the test ends."""
    register = ControlRegister()
    before = register.get()
    yield register
    register.set(before)


class Work:
    """Inputs whose results flush-to-zero or another rounding mode would change; enough to keep several threads busy."""

    T, R, C, V = 300, 200, 96, 200

    def __init__(self, kernels, bench):
        self.bench, self.x_TC = bench, bench.floats(self.T, self.C)
        self.gain_C = bench.of(np.ones(self.C, np.float32))
        self.x_TC[::2] *= np.float32(1e-38)
        self.operand = bench.operand(kernels, self.x_TC, quantized=False)
        packed = bench.packed(kernels, bench.floats(self.R, self.C), WeightFormat.F32, 0)
        self.matrices = MatrixList([(packed, self.R, 0, MatrixFormat(WeightFormat.F32, 0))])
        self.logits_TV, self.temperature_T = bench.floats(40, self.V, scale=30), bench.of(np.ones(40, np.float32))
        self.how = SamplingParameters(temperature=1.0, seed=1)

    def results(self, kernels):
        empty, fault_T = self.bench.empty, self.bench.faults(40)
        out_TR, normed_TC = empty((self.T, self.R), np.float32), empty((self.T, self.C), np.float32)
        max_TB, sum_TB = empty((40, 2), np.float32), empty((40, 2), np.float32)
        ids_TN, best_TN = empty((40, self.V), np.int32), empty((40, self.V), np.float32)
        kernels.matmul(out_TR, self.matrices, self.operand, self.T)
        kernels.rmsnorm(normed_TC, self.x_TC, self.gain_C, np.float32(1e-6))
        kernels.vocabulary_blocks(max_TB, sum_TB, fault_T, self.logits_TV, self.temperature_T, self.V, 0)
        kernels.top_logits(ids_TN, best_TN, self.logits_TV, max_TB, np.arange(2, dtype=np.int32), self.V)
        drawn = [kernels.sample(self.how, ids_TN[t], best_TN[t], max_TB[t], sum_TB[t], True) for t in range(40)]
        return out_TR, normed_TC, sum_TB, np.array(drawn)


def test_flush_to_zero_changes_nothing_and_comes_back(kernels, bench, same_bits, register):
    work = Work(kernels, bench)
    expected = work.results(kernels)
    assert ((np.abs(expected[0]) > 0) & (np.abs(expected[0]) < 2.0**-126)).any(), "no denormal result: a weak test"
    hash_before = kernels.self_test()
    before = register.get()
    register.set(register.hostile)
    found = work.results(kernels)
    hash_now = kernels.self_test()
    with Kernels(threads=kernels.threads, isa=kernels.isa) as born_hostile:  # threads inherit the register
        found_too = work.results(born_hostile)
    after = register.get()
    register.set(before)
    assert after == register.hostile, "the caller's register was not restored"
    assert hash_now == hash_before
    same_bits(found, expected)
    same_bits(found_too, expected)


def test_self_test_is_one_number_everywhere(kernels):
    # The bits of version 1 of the contract. Another number needs another DM_NUMERICS_VERSION (or another self-test).
    assert hex(kernels.self_test()) == "0xb09273dca436cc70"


def test_unknown_level_names_the_available_ones(monkeypatch):
    with pytest.raises(UsageError, match=f"'sse1'.*{', '.join(isa_levels())}"):
        Kernels(isa="sse1")
    monkeypatch.setenv("DIST_MOE_ISA", "mmx")
    with pytest.raises(UsageError, match="mmx"):
        Kernels()
    monkeypatch.setenv("DIST_MOE_ISA", "portable")
    with Kernels() as kernels:
        assert kernels.isa == "portable"
    monkeypatch.delenv("DIST_MOE_ISA")
    with Kernels() as kernels:
        assert kernels.isa == isa_levels()[-1]


def test_contexts_report_themselves_and_close():
    with pytest.raises(UsageError, match="at least 1"):
        Kernels(threads=0)
    assert isa_levels()[0] == "portable"
    with Kernels(threads=3, isa="portable") as kernels:
        assert kernels.threads == 3
    kernels.close()  # twice is harmless
    with pytest.raises(TypeError):
        kernels.self_test()
