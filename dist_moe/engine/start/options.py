"""How an engine runs."""

from __future__ import annotations

from dataclasses import dataclass

from dist_moe.kernels import KvFormat


@dataclass(frozen=True)
class EngineOptions:
    """How the engine runs; every rank needs the same ones, but for `threads`, `isa` and `bind`.

    `context`: positions of a sequence at most. `experts`: auto, whole, sliced or shared.
    `exchange`: auto, allreduce or alltoall. `wire`: exact, bf16 or q8. `isa` None: the best level.
    `check`: "full" recomputes the checksums of all weights first, "fast" leaves it at what opening the store did.
    `scrub`: recompute those of mapped weights in idle time, too. `bind`: a core for each thread (`parallel.cores`).
    `resident`: positions of K and V that sequences may hold together, finished ones too, for prompts that begin like
    them; None: one context, which a single sequence may need anyway; 0: nothing outlives its sequence.
    `copy_weights`: into each rank's own memory, huge pages where there are any, instead of reading the mapped files.
    """

    context: int
    threads: int = 1
    experts: str = "auto"
    exchange: str = "auto"
    wire: str = "exact"
    kv: KvFormat = KvFormat.F16
    prefill_chunk: int = 256
    isa: str | None = None
    check: str = "fast"
    scrub: bool = False
    bind: tuple[int, ...] | None = None
    copy_weights: bool = False
    resident: int | None = None

    @property
    def step_exchange(self) -> str:
        """The exchange to choose: what rounded sums give may depend on the hosts, but not on measured times."""
        return "allreduce" if self.wire != "exact" and self.exchange == "auto" else self.exchange

    @property
    def layout(self) -> str:
        """The layout of experts to choose: of copied weights no rank wants all chunks, which dealing them out takes."""
        return "whole" if self.copy_weights and self.experts == "auto" else self.experts

    @property
    def resident_positions(self) -> int:
        """Positions that running and finished sequences may hold together before finished ones are dropped."""
        return 0 if self.resident == 0 else max(self.context, self.resident or 0)
