"""A thread per rank that ends the job when it is stuck: it names whom all wait for, and never lets a job hang.

Rank 0 judges by what all ranks report; the others judge only whether rank 0 is still there, or, where no side channel
could be made, whether they themselves move.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import secrets
import threading
import time
from dataclasses import replace
from types import ModuleType

from dist_moe.parallel.launcher import Launcher
from dist_moe.parallel.lifeline import STALLED
from dist_moe.parallel.mpi import end_from_thread, say
from dist_moe.parallel.progress import Phase, Progress
from dist_moe.parallel.side_channel import (
    LEAVING,
    TOKEN_BYTES,
    WELL,
    FollowerChannel,
    LeaderChannel,
    connect,
    local_addresses,
)
from dist_moe.parallel.stalls import Report, Seen, find_stall, name_ranks
from dist_moe.parallel.world import World

logger = logging.getLogger(__name__)

TICK_S = 1.0
_CONNECT_S = 5.0
# Loading has no layers to count: what uses this share of a core moves. A process that only waits uses a thousandth.
_COMPUTES = 0.02
# Time in which this thread itself did not run (a suspended machine, a stopped job) is not held against others.
_LONGEST_TICK_S = 2.0
# When Hydra kills all ranks, this one dies within so long of the first, and should not call that a death.
_ALL_KILLED_S = 0.02
# A launcher ends the job of a dead rank by itself, and all but Hydra name the rank or its error before. Where that does
# not happen, this rank does it after so long.
_LAUNCHER_ENDS_S = 3.0
# A rank that fails has this long to print why and to end the job, longer than `guarded` takes.
_LEAVING_S = 15.0
# Rank 0 speaks first; then the lowest rank that misses it, and so on.
_STAGGER_S = 0.8
_LONGEST_STAGGER_S = 2.4


class OwnWatch:
    """How long this rank has not moved; one that reads pages of a mapped file moves, or that computes while loading."""

    def __init__(self, progress: Progress) -> None:
        """Watch this progress."""
        self._progress = progress
        self._mark = progress.mark()
        self._blocks = 0
        self._cpu_s = 0.0
        self._still_s = 0.0

    def look(self, elapsed_s: float) -> Report:
        """The rank's report, so many seconds after the last look."""
        progress, usage = self._progress, resource.getrusage(resource.RUSAGE_SELF)
        mark, waiting, loading = progress.mark(), progress.waiting > 0, progress.phase is Phase.LOADING
        blocks, cpu_s = usage.ru_majflt + usage.ru_inblock, usage.ru_utime + usage.ru_stime
        computes = loading and cpu_s - self._cpu_s >= _COMPUTES * elapsed_s
        moved = mark != self._mark or (not waiting and (blocks != self._blocks or computes))
        self._mark, self._blocks, self._cpu_s = mark, blocks, cpu_s
        self._still_s = 0.0 if moved else self._still_s + elapsed_s
        return Report(progress.step, progress.layer, progress.phase, waiting, self._still_s, asked=progress.asked)


class Watchdog:
    """The watching thread of a rank and its channel, from the start of the job to the end of the process."""

    def __init__(self, world: World, launcher: Launcher, timeout_s: float) -> None:
        """Connect the ranks and begin to watch; collective. A rank alone needs no watching.

        Args:
            world: All ranks; `world.progress` is what is watched.
            launcher: Where it names a killed rank, the ranks leave that to it.
            timeout_s: Seconds without progress while loading or inside a step, or without a word from a rank, that
                end the job.
        """
        self._watcher: _Leader | _Follower | None = None
        if world.mpi is None or world.size == 1:
            return
        naming_s = _ALL_KILLED_S if launcher.name == "mpich" else _LAUNCHER_ENDS_S
        start = _start_leader if world.is_leader else _start_follower
        self._watcher = start(world, timeout_s, naming_s)

    def leave(self) -> None:
        """Tell all ranks that ends are to be expected now: this rank is done, or ends the job by itself."""
        if self._watcher is not None:
            self._watcher.leave()


def _start_leader(world: World, timeout_s: float, naming_s: float) -> _Leader:
    token = secrets.token_bytes(TOKEN_BYTES)
    channel = LeaderChannel(world.size, token, everywhere=world.nodes > 1)
    leader = _Leader(world, timeout_s, naming_s, channel)
    leader.start()
    addresses = local_addresses()
    world.gather_texts(json.dumps([addresses, channel.port, token.hex()]))
    if missing := [int(text) for text in world.gather_texts("") if text]:
        logger.warning(
            "%s cannot reach rank 0 by TCP on %s, port %d (a firewall?): a stall there is noticed, but not its cause",
            name_ranks(missing, world.hosts),
            ", ".join(addresses),
            channel.port,
        )
    return leader


def _start_follower(world: World, timeout_s: float, naming_s: float) -> _Follower:
    addresses, port, token = json.loads(world.gather_texts("")[0])
    channel = connect(addresses, port, bytes.fromhex(token), world.rank, _CONNECT_S)
    if channel:
        channel.report(Report())
    follower = _Follower(world, timeout_s, naming_s, channel)
    follower.start()
    world.gather_texts("" if channel else str(world.rank))
    return follower


def _death_line(who: str) -> str:
    return f"{who} has died (killed, perhaps for want of memory, or crashed)"


class _Watcher(threading.Thread):
    """What rank 0 and the others have in common: a loop that listens and, once a second, looks."""

    def __init__(self, world: World, timeout_s: float, naming_s: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        assert world.mpi is not None
        self._mpi: ModuleType = world.mpi
        self._world = world
        self._timeout_s = timeout_s
        self._naming_s = naming_s
        self._own = OwnWatch(world.progress)
        self._leaving = False

    def run(self) -> None:
        """Watch until the process ends."""
        looked_s = time.monotonic()
        while True:
            self._listen(max(0.0, looked_s + TICK_S - time.monotonic()))
            elapsed_s = time.monotonic() - looked_s
            if elapsed_s >= TICK_S:
                looked_s += elapsed_s
                self._look(self._own.look(min(elapsed_s, _LONGEST_TICK_S)), min(elapsed_s, _LONGEST_TICK_S))

    def _listen(self, timeout_s: float) -> None:
        raise NotImplementedError

    def _look(self, own: Report, elapsed_s: float) -> None:
        raise NotImplementedError

    def _end(self, line: str = "") -> None:
        end_from_thread(self._mpi, STALLED, line)


class _Leader(_Watcher):
    """Rank 0: knows where all ranks are."""

    def __init__(self, world: World, timeout_s: float, naming_s: float, channel: LeaderChannel) -> None:
        super().__init__(world, timeout_s, naming_s)
        self._channel = channel
        self._seen = {0: Seen(Report())}
        self._asked = 0

    def leave(self) -> None:
        self._leaving = True
        self._channel.say(LEAVING)

    def _listen(self, timeout_s: float) -> None:
        for news in self._channel.wait(timeout_s):
            if news.report is None:
                self._lose(news.rank)
            else:
                self._seen[news.rank] = Seen(news.report)
                self._obey(news.report.asked)
                if news.report.leaving and not self._leaving:
                    self.leave()

    def _obey(self, asked: int) -> None:
        """A signal came to another rank alone, as of a host that is taken down: it is as if it had come here."""
        if asked and not self._asked and not self._leaving:
            self._asked = asked
            os.kill(os.getpid(), asked)

    def _look(self, own: Report, elapsed_s: float) -> None:
        self._channel.say(LEAVING if self._leaving else WELL)
        for rank, seen in self._seen.items():
            self._seen[rank] = Seen(seen.report, seen.silent_s + elapsed_s)
        self._seen[0] = Seen(own)
        patience_s = self._timeout_s + (_LEAVING_S if self._leaving else 0.0)
        stall = find_stall(self._seen, self._world.hosts, patience_s)
        if stall is not None:
            self._end(stall)

    def _end(self, line: str = "") -> None:
        self.leave()  # where ending takes long, the others must not miss this rank meanwhile
        super()._end(line)

    def _lose(self, rank: int) -> None:
        """A connection broke: the rank is dead, or its host."""
        self._seen.pop(rank, None)
        if self._leaving:
            return
        self.leave()
        time.sleep(self._naming_s)
        say(_death_line(name_ranks([rank], self._world.hosts)))
        time.sleep(_LAUNCHER_ENDS_S)
        self._end()


class _Follower(_Watcher):
    """Another rank: knows whether rank 0 is there, and itself."""

    def __init__(self, world: World, timeout_s: float, naming_s: float, channel: FollowerChannel | None) -> None:
        super().__init__(world, timeout_s, naming_s)
        self._channel = channel
        self._silent_s = 0.0
        self._patience_s = timeout_s + min((world.rank - 1) * _STAGGER_S, _LONGEST_STAGGER_S)

    def leave(self) -> None:
        self._leaving = True
        if self._channel is not None:
            self._channel.report(Report(leaving=True))

    def _listen(self, timeout_s: float) -> None:
        if self._channel is None:
            time.sleep(timeout_s)
            return
        words = self._channel.wait(timeout_s)
        if words is None:
            self._lose()
        elif words:
            self._silent_s = 0.0
            self._leaving |= LEAVING in words

    def _look(self, own: Report, elapsed_s: float) -> None:
        self._silent_s += elapsed_s
        if self._channel is None:
            self._judge_alone(own)
            return
        self._channel.report(replace(own, leaving=self._leaving))
        if self._silent_s >= self._patience_s + (_LEAVING_S if self._leaving else 0.0):
            self._end(
                f"{self._here} has had no word from {self._leader} for {self._timeout_s:g} s (--stall-timeout): "
                "that one is stopped, or its host or the network is down"
            )

    def _judge_alone(self, own: Report) -> None:
        if not own.phase.timed or own.still_s < self._patience_s + (_LEAVING_S if self._leaving else _STAGGER_S):
            return
        waits = "waits for other ranks" if own.waiting else "is stuck"
        line = f"{self._here} {waits} in {own.place} for {self._timeout_s:g} s (--stall-timeout)"
        self._end("" if self._leaving else line)  # who ends the job has said why

    def _lose(self) -> None:
        self._channel = None
        if self._leaving:
            return
        time.sleep(self._naming_s if self._world.rank == 1 else _LAUNCHER_ENDS_S)
        say(_death_line(self._leader))
        time.sleep(_LAUNCHER_ENDS_S)
        self._end()

    @property
    def _here(self) -> str:
        return name_ranks([self._world.rank], self._world.hosts)

    @property
    def _leader(self) -> str:
        return name_ranks([0], self._world.hosts)
