"""How an engine runs, as a user says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dist_moe.errors import UsageError
from dist_moe.store.rope_scaling import RopeScaling

LARGEST_SEED = 2**63 - 1
MOST_BIAS = 1e6
MOST_SAMPLES = 1024
MOST_BEAMS = 128
MOST_LOGPROBS = 256  # what every rank sends of a row, see `candidates.CANDIDATES`
DEFAULT_MAX_TOKENS = 256
# Of an engine that is not told how long its texts become; the K and V of Qwen3-30B-A3B take 0.8 GB of it in f16.
DEFAULT_CONTEXT = 8192
MOST_THREADS = 1024
MOST_CHUNK = 65536
_CHOICES = {
    "quant": ("f32", "bf16", "q8", "q4"),
    "kv": ("f32", "f16", "q8"),
    "experts": ("auto", "whole", "sliced", "shared"),
    "exchange": ("auto", "allreduce", "alltoall"),
    "wire": ("exact", "bf16", "q8"),
    "weights": ("mapped", "copy"),
    "check": ("fast", "full"),
    "bind": ("auto", "keep"),
}


@dataclass(frozen=True)
class Settings:
    """The options of an `Engine`, which documents them. Rank 0's hold everywhere, but for `threads` and `isa`."""

    context: int | None = None
    threads: int | None = None
    kv: str = "f16"
    experts: str = "auto"
    exchange: str = "auto"
    wire: str = "exact"
    prefill_chunk: int = 256
    weights: str = "mapped"
    isa: str | None = None
    check: str = "fast"
    scrub: bool = False
    bind: str = "auto"
    quant: str | None = None
    stall_timeout_s: float = 60.0
    start_timeout_s: float = 60.0
    rope_scaling: str | None = None
    resident: int | None = None
    threads_by_host: Mapping[str, int] = field(default_factory=dict)

    def require_valid(self) -> None:
        """Refuse values that nothing can be done with.

        Raises:
            UsageError: One of them; the sentence says which, what was expected and what was found.
        """
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None or name != "quant":
                require_choice(name, value, choices)
        if self.wire != "exact" and self.exchange == "alltoall":
            raise UsageError(
                f"wire {self.wire} rounds the sums that exchange allreduce makes, those of alltoall are always exact: "
                "leave exchange out, or take wire exact"
            )
        for name, most in (("context", 2**31 - 1), ("threads", MOST_THREADS)):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), 1, most)
        if self.resident is not None:
            require_whole("resident", self.resident, 0, 2**31 - 1)
        if self.rope_scaling is not None:
            RopeScaling.parse(self.rope_scaling)
        require_whole("prefill_chunk", self.prefill_chunk, 1, MOST_CHUNK)
        require_number("stall_timeout_s", self.stall_timeout_s, 2, 86400)
        require_number("start_timeout_s", self.start_timeout_s, 1, 86400)


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse anything but some words.

    Raises:
        UsageError: It is none of them.
    """
    if value not in choices:
        raise UsageError(f"{name}: expected {', '.join(choices[:-1])} or {choices[-1]}, found {value!r}")


def require_whole(name: str, value: object, least: int, most: int) -> None:
    """Refuse anything but a whole number in a range.

    Raises:
        UsageError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UsageError(f"{name}: expected a whole number from {least} to {most}, found {value!r}")


def require_number(name: str, value: object, least: float, most: float) -> None:
    """Refuse anything but a number in a range.

    Raises:
        UsageError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise UsageError(f"{name}: expected a number from {least:g} to {most:g}, found {value!r}")
