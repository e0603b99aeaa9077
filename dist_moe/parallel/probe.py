"""What messages between hosts cost, measured when a job starts: the choice of exchanges goes by it, no bit does."""

from __future__ import annotations

import time

import numpy as np

from dist_moe.parallel.cost import LinkCosts as LinkCosts
from dist_moe.parallel.host_exchange import HostExchange

SIZES_BYTES = (2048, 65536, 1 << 20)
# A size is sent again until this time has passed; at least twice.
_SIZE_S = 2e-3
# Longer ones travel in messages of this many bytes, as sums do.
_MESSAGE_BYTES = 16384
_MOST_ROUNDS = 20
# When a size took longer than this, larger ones are not tried.
_SLOW_S = 0.1


# Before anything was measured, and where hosts are as near as ranks: 1 Gbit/s Ethernet.
DEFAULT_COSTS = LinkCosts(5e-5, 1.17e8)


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

    Args:
        seconds_of: By message size in bytes; at least one.
        hosts: How many there are.
    """
    sizes = sorted(seconds_of)
    small, large = sizes[0], sizes[-1]
    peers = hosts - 1
    rate = DEFAULT_COSTS.bytes_per_s
    if large > small and seconds_of[large] > seconds_of[small]:
        rate = peers * (large - small) / (seconds_of[large] - seconds_of[small])
    # A shaped link lets small messages through faster than its rate.
    latency_s = max(seconds_of[small] / (2 * peers), seconds_of[small] - peers * small / rate)
    return LinkCosts(latency_s, rate)


def _round_seconds(exchange: HostExchange, size_bytes: int) -> float:
    """The quickest of some rounds on this host; the hosts do equally many."""
    lengths = [min(_MESSAGE_BYTES, size_bytes - first) for first in range(0, size_bytes, _MESSAGE_BYTES)]
    first_s = 0.0
    for _ in range(2):
        first_s = _one_round(exchange, lengths)
    rounds = int(min(_MOST_ROUNDS, max(2, _SIZE_S / _slowest(exchange, first_s))))
    return min(_one_round(exchange, lengths) for _ in range(rounds))


def _one_round(exchange: HostExchange, lengths: list[int]) -> float:
    outgoing = np.zeros(max(lengths), np.uint8)
    incoming_N = list(np.zeros((exchange.hosts, max(lengths)), np.uint8))
    with exchange.progress.exchanging():
        started_s = time.perf_counter()
        swaps = [exchange.post([outgoing[:length]] * exchange.hosts, incoming_N) for length in lengths]
        for swap in swaps:
            for _ in swap.finish():
                pass
        return time.perf_counter() - started_s


def _slowest(exchange: HostExchange, seconds: float) -> float:
    """The hosts' largest, equal on all of them."""
    everyone_N = np.zeros((exchange.hosts, 8), np.uint8)
    own = np.array([seconds]).view(np.uint8)
    exchange.swap([own] * exchange.hosts, list(everyone_N))
    everyone_N[exchange.host] = own
    return float(everyone_N.view(np.float64).max())
