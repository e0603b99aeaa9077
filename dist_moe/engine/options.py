"""How an engine runs."""

from __future__ import annotations

from dataclasses import dataclass

from dist_moe.kernels import KvFormat


@dataclass(frozen=True)
class EngineOptions:
    """How the engine runs; every rank needs the same ones, but for `threads`, `isa` and `bind`.

    `context`: positions of a sequence at most. `experts`: auto, whole, sliced or shared. `isa` None: the best level.
    `check`: "full" recomputes the checksums of all weights first, "fast" leaves it at what opening the store did.
    `scrub`: recompute those of mapped weights in idle time, too. `bind`: a core for each thread (`parallel.cores`).
    """

    context: int
    threads: int = 1
    experts: str = "auto"
    kv: KvFormat = KvFormat.F16
    prefill_chunk: int = 256
    isa: str | None = None
    check: str = "fast"
    scrub: bool = False
    bind: tuple[int, ...] | None = None
