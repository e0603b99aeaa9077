"""--scrub: the checksums of this rank's weights, recomputed while nothing else is to be done."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial

from dist_moe.engine.start.verification import share_of_rank
from dist_moe.errors import StoreError
from dist_moe.model.weights import ModelWeights
from dist_moe.parallel.plan import Plan
from dist_moe.parallel.world import World
from dist_moe.store.checksum import RunningChecksum
from dist_moe.store.private_copy import PrivateCopy
from dist_moe.store.reader import Store
from dist_moe.store.sealed import Sealed
from dist_moe.store.units import UnitKind
from dist_moe.store.verify import ADVICE

# A step that begins waits for one piece at most: 0.1 ms from memory.
PIECE_BYTES = 1 << 20
# Steps follow each other within microseconds; only a longer pause is idle time.
_SETTLED_S = 0.05
# Of one core, while idle.
_SHARE_OF_CORE = 0.01
_NICE = 19
_COPY_ADVICE = "check this host's memory (dmesg, a memory test) and start again"


class Scrubber:
    """Walks over units in a thread of its own, at low priority, between steps; endlessly, until something is damaged.

    Attributes:
        damage: What was found, or None.
        passes: How often all units have been checked.
    """

    def __init__(self, units: Callable[[], Iterable[Sealed]]) -> None:
        """Prepare; `start` begins.

        Args:
            units: What to check, in order; called once per pass.
        """
        self.damage: StoreError | None = None
        self.passes = 0
        self._units = units
        self._pieces = self._walk()
        self._turn = threading.Lock()  # whoever holds it takes the next piece
        self._idle_since_s: float | None = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrub", daemon=True)

    def start(self) -> None:
        """Begin to use idle time."""
        self._thread.start()

    def pause(self) -> None:
        """A step begins."""
        self._idle_since_s = None

    def resume(self) -> None:
        """A step has ended."""
        self._idle_since_s = time.monotonic()

    def check_piece(self) -> int:
        """Check the next piece; its bytes, 0 if there is nothing left to find."""
        with self._turn:
            return next(self._pieces, 0)

    def finish_pass(self) -> None:
        """Check, here and now, what is left of the first pass."""
        while self.passes == 0 and self.check_piece():
            pass

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _walk(self) -> Iterator[int]:
        """Check all units again and again, yielding after each piece its bytes; ends at the first damage."""
        while True:
            for sealed in self._units():
                running = RunningChecksum()
                for first in range(0, len(sealed.data), PIECE_BYTES):
                    piece = sealed.data[first : first + PIECE_BYTES]
                    running.update(piece)
                    yield len(piece)
                if running.value() != sealed.checksum:
                    advice = _COPY_ADVICE if sealed.copied else ADVICE
                    self.damage = StoreError(f"{sealed.damage(running.value())}; {advice}")
                    return
            self.passes += 1

    def _check_turn(self) -> bool:
        """Check as many pieces as one long one has bytes, fewer if a step begins; False if nothing is left to find.

        Waking up may cost more than a small piece, and is paid for in idle time as well.
        """
        checked_bytes = 0
        while checked_bytes < PIECE_BYTES and self._idle_since_s is not None:
            piece_bytes = self.check_piece()
            if not piece_bytes:
                return False
            checked_bytes += piece_bytes
        return True

    def _run(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        pause_s = _SETTLED_S
        while not self._closed.wait(pause_s):
            started_s = time.monotonic()
            idle_since_s = self._idle_since_s
            if idle_since_s is None or started_s - idle_since_s < _SETTLED_S:
                pause_s = _SETTLED_S
                continue
            if not self._check_turn():
                return
            pause_s = (time.monotonic() - started_s) / _SHARE_OF_CORE


def start_scrub(world: World, weights: ModelWeights, plan: Plan) -> Scrubber:
    """Begin to scrub what this rank computes with, mapped or copied, in idle time; collective."""
    store, copy = weights.store, weights.copy
    part, parts = share_of_rank(world, str(store.directory.resolve()))
    mapped = partial(own_units, store, plan, part, parts)
    scrubber = Scrubber(mapped if copy is None else partial(own_copies, store, copy, part, parts))
    scrubber.start()
    return scrubber


def own_copies(store: Store, copy: PrivateCopy, part: int, parts: int) -> Iterator[Sealed]:
    """What one rank holds a copy of, and of what it does not copy its part, as `own_units` has it."""
    copied = set()
    for sealed in copy.sealed():
        copied.add(sealed.tensor)
        yield sealed
    yield from (sealed for sealed in store.sealed_common()[part::parts] if sealed.tensor not in copied)


def own_units(store: Store, plan: Plan, part: int, parts: int) -> Iterator[Sealed]:
    """What one rank computes with; what all ranks of a host share is dealt out among them.

    Args:
        store: The open store.
        plan: The rank's share.
        part: The rank's place among those that map the same files.
        parts: How many those are.
    """
    config = store.config
    yield from store.sealed_common()[part::parts]
    for layer in range(config.layers):
        readable = plan.readable_chunks(layer)
        indices = readable[part::parts] if plan.owned_chunks(layer) is None else readable
        groups: tuple[tuple[UnitKind, Iterable[int]], ...] = (
            ("head", plan.heads),
            ("kv_head", plan.kv_heads),
            ("chunk", indices.tolist()),
        )
        for kind, wanted in groups:
            yield from (store.sealed_unit(kind, layer, index) for index in wanted)
    yield from (store.sealed_unit("vocabulary", 0, block) for block in plan.vocabulary_blocks)
