"""Whom a job waits for: decided from what each rank last said. Pure functions."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from dist_moe.parallel.progress import Phase

_REPORT = struct.Struct("!qiB??Bf")

# A rank that says something every second is silent when it has missed a few words.
SILENT_S = 3.5


@dataclass(frozen=True)
class Report:
    """What a rank says of itself: its place, whether it waits in an exchange, and for how long it has not moved.

    `leaving`: ranks end from now on, in good order or because this one ends the job. `asked`: the signal that asked
    this rank for the job's end, for rank 0 to obey; 0 if none did.
    """

    step: int = 0
    layer: int = 0
    phase: Phase = Phase.STARTING
    waiting: bool = False
    still_s: float = 0.0
    leaving: bool = False
    asked: int = 0

    SIZE: ClassVar[int] = _REPORT.size

    def pack(self) -> bytes:
        """As it travels."""
        return _REPORT.pack(self.step, self.layer, self.phase, self.waiting, self.leaving, self.asked, self.still_s)

    @staticmethod
    def unpack(data: bytes) -> Report:
        """The inverse of `pack`."""
        step, layer, phase, waiting, leaving, asked, still_s = _REPORT.unpack(data)
        return Report(step, layer, Phase(phase), waiting, still_s, leaving, asked)

    @property
    def order(self) -> tuple[int, bool, int, int]:
        """What grows as the rank goes on; a rank after step n is further than one inside it."""
        return self.step, self.phase is Phase.IDLE, self.layer, self.phase

    @property
    def place(self) -> str:
        """Words for where the rank is."""
        if self.phase is Phase.LOADING:
            return "loading the model"
        if not self.phase.in_step:
            return f"the pause after step {self.step}" if self.step else "start-up"
        layer = f"layer {self.layer}, " if self.phase in (Phase.ATTENTION, Phase.EXPERTS) else ""
        return f"step {self.step}, {layer}{self.phase.name.lower()}"


@dataclass(frozen=True)
class Seen:
    """A rank as rank 0 knows it: its last report, and for how long it has said nothing."""

    report: Report
    silent_s: float = 0.0

    @property
    def still_s(self) -> float:
        """How long it has not moved, as far as is known."""
        return self.report.still_s + self.silent_s


def find_stall(ranks: Mapping[int, Seen], hosts: Sequence[str], timeout_s: float) -> str | None:
    """The sentence that names whom all wait for, or None while the job is well.

    Args:
        ranks: Rank 0 and those that report, by rank; a rank may be missing that cannot reach rank 0.
        hosts: Host name of every rank.
        timeout_s: After so many seconds of silence or standstill the job is lost.

    Returns:
        None while some rank moves, or nobody loads or is inside a step, and none has been silent too long.
    """
    silent = [rank for rank, seen in sorted(ranks.items()) if seen.silent_s >= SILENT_S]
    if any(ranks[rank].silent_s >= timeout_s for rank in silent):
        return _silence(silent, ranks, hosts)
    timed = any(seen.report.phase.timed for seen in ranks.values())
    if not timed or min(seen.still_s for seen in ranks.values()) < timeout_s:
        return None
    if silent:
        return _silence(silent, ranks, hosts)
    return f"nothing has moved for {timeout_s:g} s (--stall-timeout): {_standstill(ranks, hosts)}"


def _silence(silent: Sequence[int], ranks: Mapping[int, Seen], hosts: Sequence[str]) -> str:
    last, verb = ranks[silent[0]], _verb(silent, "has", "have")
    return (
        f"{name_ranks(silent, hosts)} {verb} been silent for {last.silent_s:.0f} s (--stall-timeout), last seen in "
        f"{last.report.place}: stopped, or the host or its network is down"
    )


def _standstill(ranks: Mapping[int, Seen], hosts: Sequence[str]) -> str:
    unknown = [rank for rank in range(len(hosts)) if rank not in ranks]
    busy = [rank for rank, seen in sorted(ranks.items()) if not seen.report.waiting]
    if busy:
        where = ranks[busy[0]].report.place
        return f"all wait for {name_ranks(busy, hosts)}, which {_verb(busy, 'is', 'are')} stuck in {where}"
    if unknown:
        return f"all others wait for {name_ranks(unknown, hosts)}, which cannot report to rank 0"
    places = {rank: seen.report.order for rank, seen in ranks.items()}
    behind = [rank for rank, place in sorted(places.items()) if place == min(places.values())]
    where = ranks[behind[0]].report.place
    if len(behind) == len(ranks):
        return f"all ranks wait for each other in {where}: the network lost a message, or this is a bug of ours"
    return f"{name_ranks(behind, hosts)} still {_verb(behind, 'waits', 'wait')} in {where}, which the others have left"


def _verb(ranks: Sequence[int], one: str, many: str) -> str:
    return one if len(ranks) == 1 else many


def name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """'rank 3 on b', 'ranks 3, 4 on b, c'; many ranks are counted."""
    numbers = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    where = ", ".join(names[:4]) + (" and others" if len(names) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers} on {where}"
