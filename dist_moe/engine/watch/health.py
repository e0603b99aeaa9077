"""Silent corruption: the ranks compare a hash of what all of them hold alike, and mapped weights with their checksums.

The hash covers the residual after the last layer and the routing weights of every layer, of every step so far: a bit
that flips in one rank's residual, embedding, norms or routers makes that rank's hash another one for good. Of a step
that is partitioned by tokens no two ranks hold the same residual: there it covers what owners sent to all, the last
attention's operand and the routing weights, and a flip at an owner reaches all ranks alike. The comparison travels in
the step's last exchange, as more numbers of a minimum: min(h) = max(h) only if all are equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dist_moe.engine.watch.scrub import Scrubber
from dist_moe.errors import EnvironmentMismatch
from dist_moe.model.transformer import Transformer
from dist_moe.parallel.exchange import Exchange

COMPARED_EVERY_STEPS = 64

_WORDS = 5  # the hash's halves, their complements, and whether a damaged unit was found
_MASK = 0xFFFFFFFF


class Health:
    """Watches over one rank's model. Methods that exchange are collective: all ranks call them alike."""

    def __init__(self, model: Transformer, exchange: Exchange, scrubber: Scrubber | None) -> None:
        """Begin with step 1.

        Args:
            model: This rank's part of the model.
            exchange: The collectives.
            scrubber: Re-checks mapped weights, on all ranks or on none.
        """
        self._model = model
        self._exchange = exchange
        self._scrubber = scrubber
        self._steps = 0
        self._compared_steps = 0

    def begin_step(self) -> None:
        """No scrubbing from here on."""
        if self._scrubber is not None:
            self._scrubber.pause()

    def end_step(self, fault_T: npt.NDArray[np.int32]) -> None:
        """The step's last exchange: reduce its faults to the lowest over ranks, and compare the ranks now and then.

        Raises:
            AgreedError: As `compare`.
        """
        self._steps += 1
        if self._steps % COMPARED_EVERY_STEPS == 0:
            self._compare(fault_T)
        else:
            self._exchange.min_faults(fault_T)
        if self._scrubber is not None:
            self._scrubber.resume()

    def compare(self) -> None:
        """Compare the ranks now.

        Raises:
            AgreedError: A rank holds other numbers than the others, or found damaged weights; it is named.
        """
        self._compare(np.empty(0, np.int32))

    def finish_scrub(self) -> None:
        """Check what no idle time was found for, so that every mapped unit has been checked once; then compare.

        Raises:
            AgreedError: As `compare`.
        """
        if self._scrubber is not None:
            self._scrubber.finish_pass()
            self._exchange.world.sleep_until_all()
        self.compare()

    def _compare(self, fault_T: npt.NDArray[np.int32]) -> None:
        damage = self._scrubber.damage if self._scrubber is not None else None
        words = np.concatenate([fault_T, to_words(self._model.state_hash, damage is not None)])
        self._exchange.min_faults(words)
        fault_T[:] = words[: len(fault_T)]
        lowest = words[len(fault_T) :]
        world = self._exchange.world
        if lowest[-1] < 0:
            world.agree(damage, "re-checking mapped weights")
        if ranks_differ(lowest):
            hashes = world.gather_texts(f"{self._model.state_hash:016x}")
            text = describe_odd_ranks(hashes, world.hosts, self._compared_steps + 1, self._steps)
            world.agree(EnvironmentMismatch(text), "comparing the ranks")
        self._compared_steps = self._steps


def to_words(state_hash: int, damaged: bool) -> npt.NDArray[np.int32]:
    """What one rank brings to the minimum: int32 [5]."""
    halves = [state_hash & _MASK, state_hash >> 32]
    words = np.array([*halves, *(half ^ _MASK for half in halves), 0], np.uint32).view(np.int32)
    words[-1] = -1 if damaged else 0
    return words


def ranks_differ(lowest: npt.NDArray[np.int32]) -> bool:
    """Whether the minimum over ranks of `to_words` comes from different hashes (min of ~h is ~ of max h)."""
    return bool((lowest[:2] != ~lowest[2:4]).any())


def describe_odd_ranks(hashes: Sequence[str], hosts: Sequence[str], first_step: int, last_step: int) -> str:
    """One sentence that names the ranks whose hash is not that of most; rank 0's counts where there is no majority.

    Args:
        hashes: By rank; not all equal.
        hosts: By rank.
        first_step: The earliest step in which it can have happened.
        last_step: The latest.
    """
    counts = Counter(hashes)
    most = max(counts.values())
    leading = [found for found, count in counts.items() if count == most]
    usual = hashes[0] if hashes[0] in leading else leading[0]
    odd = [rank for rank, found in enumerate(hashes) if found != usual]
    several = len(odd) > 1
    first = hashes.index(usual)
    others = f"rank {first} (without a majority, rank {first} itself may be wrong)"
    names = " and ".join(f"rank {rank} ({hosts[rank]})" for rank in odd)
    than = "the other ranks" if len(leading) == 1 else others
    return (
        f"{names} hold{'' if several else 's'} other numbers than {than}: the residual and the routing of steps "
        f"{first_step} to {last_step} have hash {hashes[odd[0]]}, not {usual}; the text since then may be wrong: check "
        f"memory, CPU and store (dist-moe inspect --verify) of {'these hosts' if several else 'this host'}"
    )
