"""What messages between hosts cost, measured when a job starts: the choice of exchanges goes by it, no bit does."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import numpy.typing as npt

from dist_moe.parallel.cost import PRESET_LINKS, LinkCosts
from dist_moe.parallel.host_exchange import Bytes, HostExchange, Swap

Floats = npt.NDArray[np.float64]

SIZES_BYTES = (2048, 65536, 1 << 20)
# A size is sent again until this time has passed; at least twice.
_SIZE_S = 2e-3
# Longer ones travel in messages of this many bytes, as sums do.
_MESSAGE_BYTES = 16384
_MOST_ROUNDS = 20
# When a size took longer than this, larger ones are not tried.
_SLOW_S = 0.1
# Messages under way to each host, each of which is received in a place of its own.
_UNDER_WAY = 16
# A size whose time is further from the line through all sizes shows that no line describes the link.
_MOST_OFF = 0.2

# Before anything was measured, and where hosts are as near as ranks.
DEFAULT_COSTS = PRESET_LINKS["1gbe"]


def probe_links(exchange: HostExchange) -> LinkCosts:
    """Measure messages that all hosts exchange with all others at once; collective, equal on all hosts.

    Takes some milliseconds on a fast network, and at most seconds on one where 64 KB take a tenth of one.
    """
    seconds_of = {}
    for size_bytes in SIZES_BYTES:
        seconds_of[size_bytes] = _slowest(exchange, _round_seconds(exchange, size_bytes))
        if seconds_of[size_bytes] > _SLOW_S:
            break
    return fit_costs(seconds_of, exchange.hosts)


def fit_costs(seconds_of: dict[int, float], hosts: int) -> LinkCosts:
    """Latency and rate from the seconds of an exchange in which each host sends a message to every other one.

    A line through all sizes, of least squares of the relative errors: noise grows with the time. Where a size is far
    off that line (a shaper lets bursts through), the line through the smallest and the largest.

    Args:
        seconds_of: By message size in bytes; at least one.
        hosts: How many there are.
    """
    peers = hosts - 1
    sent_bytes = peers * np.array(sorted(seconds_of), np.float64)
    seconds = np.array([seconds_of[size] for size in sorted(seconds_of)])
    seconds = np.minimum.accumulate(seconds[::-1])[::-1]  # what is longer cannot take less
    rate = DEFAULT_COSTS.bytes_per_s
    slope, latency_s = 1 / rate, seconds[0] - sent_bytes[0] / rate
    if seconds[-1] > seconds[0]:
        slope, latency_s = _line(sent_bytes, seconds)
        if (np.abs(latency_s + slope * sent_bytes - seconds) > _MOST_OFF * seconds).any():
            slope, latency_s = _line(sent_bytes[[0, -1]], seconds[[0, -1]])
    # A shaped link lets small messages through faster than its rate.
    return LinkCosts(max(float(seconds[0]) / (2 * peers), float(latency_s)), 1 / float(slope))


def _line(x_n: Floats, y_n: Floats) -> tuple[float, float]:
    """Slope and intercept with the least squares of the errors relative to y."""
    slope, intercept = np.polyfit(x_n, y_n, 1, w=1 / y_n)
    return float(slope), float(intercept)


def _round_seconds(exchange: HostExchange, size_bytes: int) -> float:
    """The quickest of some rounds on this host; the hosts do equally many."""
    lengths = [min(_MESSAGE_BYTES, size_bytes - first) for first in range(0, size_bytes, _MESSAGE_BYTES)]
    outgoing = np.zeros(max(lengths), np.uint8)
    shape = (min(_UNDER_WAY, len(lengths)), exchange.hosts, max(lengths))
    slots = [list(slot_N) for slot_N in np.zeros(shape, np.uint8)]
    messages = [outgoing[:length] for length in lengths]
    first_s = 0.0
    for _ in range(2):
        first_s = _one_round(exchange, messages, slots)
    rounds = int(min(_MOST_ROUNDS, max(2, _SIZE_S / _slowest(exchange, first_s))))
    return min(_one_round(exchange, messages, slots) for _ in range(rounds))


def _one_round(exchange: HostExchange, messages: list[Bytes], slots: list[list[Bytes]]) -> float:
    """Seconds of all messages to every host; `slots` are where they are received, in turn."""
    under_way: deque[Swap] = deque()
    with exchange.progress.exchanging():
        started_s = time.perf_counter()
        for number, message in enumerate(messages):
            if len(under_way) == len(slots):
                _finish(under_way.popleft())
            under_way.append(exchange.post([message] * exchange.hosts, slots[number % len(slots)]))
        while under_way:
            _finish(under_way.popleft())
        return time.perf_counter() - started_s


def _finish(swap: Swap) -> None:
    for _ in swap.finish():
        pass


def _slowest(exchange: HostExchange, seconds: float) -> float:
    """The hosts' largest, equal on all of them."""
    everyone_N = np.zeros((exchange.hosts, 8), np.uint8)
    own = np.array([seconds]).view(np.uint8)
    exchange.swap([own] * exchange.hosts, list(everyone_N))
    everyone_N[exchange.host] = own
    return float(everyone_N.view(np.float64).max())
