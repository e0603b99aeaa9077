"""The life of a kernel context: an ISA level, a thread pool and its scratch memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import TypeVar

from dist_moe.errors import EnvironmentMismatch, UsageError
from dist_moe.kernels.arrays import Pointer
from dist_moe.kernels.library import ffi, lib

Self = TypeVar("Self", bound="Context")


def isa_levels() -> list[str]:
    """The ISA levels of this build that this machine can run, best last."""
    names = lib.dm_isa_levels()
    levels: list[str] = []
    index = 0
    while names[index] != ffi.NULL:
        if lib.dm_isa_available(names[index]):
            levels.append(ffi.string(names[index]).decode())
        index += 1
    return levels


class Context:
    """An ISA level, a thread pool and its scratch memory; one at a time may be used from one thread."""

    def __init__(self, threads: int = 1, isa: str | None = None, spin: bool = True) -> None:
        """Start the thread pool.

        Args:
            threads: Threads that compute, the caller's included.
            isa: An ISA level; None takes DIST_MOE_ISA from the environment, or else the best one available.
            spin: Whether waiting threads spin for some microseconds; False where ranks and threads outnumber the cores.

        Raises:
            UsageError: The level is unknown or this machine cannot run it.
            EnvironmentMismatch: Memory or threads are lacking.
        """
        levels = isa_levels()
        isa = isa or os.environ.get("DIST_MOE_ISA") or levels[-1]
        if isa not in levels:
            raise UsageError(
                f"ISA level {isa!r} (option or DIST_MOE_ISA) is not available here; choose one of {', '.join(levels)}"
            )
        if threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}")
        self.isa = isa
        self.threads = threads
        self._context: Pointer = lib.dm_context_create(isa.encode(), threads, spin)
        if self._context == ffi.NULL:
            raise EnvironmentMismatch(
                f"cannot start {threads} threads for the {isa} kernels; lower --threads or free memory"
            )

    def bind(self, cores: Sequence[int]) -> bool:
        """Bind thread i to core cores[i] until `close`, the calling thread first; False if the system does not let us.

        For jobs whose threads fill their cores: the scheduler else lets two of them share one core now and then.
        """
        if len(cores) != self.threads:
            raise TypeError(f"{len(cores)} cores for {self.threads} threads")
        return int(lib.dm_context_bind(self._context, ffi.new("int32_t[]", list(cores)))) == 0

    def close(self) -> None:
        """End the threads and free the scratch memory; every later call is refused."""
        if self._context is not None:
            lib.dm_context_destroy(self._context)
            self._context = None

    def __enter__(self: Self) -> Self:
        """Return the kernels themselves."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def self_test(self) -> int:
        """A 64-bit hash of known answers, equal on every machine that keeps the contract (rule 16)."""
        return int(lib.dm_self_test(self._context))
