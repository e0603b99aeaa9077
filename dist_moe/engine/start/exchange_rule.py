"""Which steps send tokens to their experts (alltoall) and which add up sums everywhere (allreduce); rank 0 decides."""

from __future__ import annotations

import logging
from collections.abc import Callable

from dist_moe.parallel.cost import ExchangeTable, LinkCosts, WireShape, choose_exchange, exchange_table

logger = logging.getLogger(__name__)


def partition_rule(wanted: str, shape: WireShape, nodes: int, link: LinkCosts | None) -> Callable[[int], bool]:
    """Whether a step of so many tokens is partitioned by them; no choice changes a bit.

    Args:
        wanted: auto, allreduce or alltoall.
        shape: Of the model.
        nodes: Hosts of the job.
        link: What messages between hosts cost; None on one host, where auto always adds up sums.
    """
    if wanted != "auto" or link is None:
        return lambda tokens: wanted == "alltoall"
    table = exchange_table(shape, nodes, link)
    logger.info("exchange: %s", describe_table(table, link))
    return lambda tokens: choose_exchange(tokens, table) == "alltoall"


def describe_table(table: ExchangeTable, link: LinkCosts) -> str:
    """In words: what the link costs, and where auto changes."""
    costs = f"a message between hosts takes {link.latency_s * 1e6:.0f} us and 1 s per {link.bytes_per_s / 1e6:.0f} MB"
    if not table.changes:
        return f"{costs}; auto takes allreduce for every step"
    names = ("alltoall", "allreduce")
    turns = ", ".join(f"{names[place % 2]} from {tokens} tokens" for place, tokens in enumerate(table.changes))
    return f"{costs}; auto takes allreduce for small steps, {turns}"
