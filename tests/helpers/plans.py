"""Plans for tests."""

from __future__ import annotations

from collections.abc import Sequence

from dist_moe.parallel.plan import JobPlan, Plan, plan_job
from dist_moe.store.reader import Store


def job_of(store: Store, ranks: int | Sequence[int], layout: str = "whole") -> JobPlan:
    """The shares of so many ranks on one host, or of ranks on these nodes, all of which have the whole store."""
    node_of_rank = [0] * ranks if isinstance(ranks, int) else ranks
    return plan_job(store.config, store.manifest.group_size, layout, node_of_rank=node_of_rank)


def plan_of(store: Store, rank: int, ranks: int, layout: str) -> Plan:
    """The share of one of so many ranks on one host, which has the whole store."""
    return job_of(store, ranks, layout).plans[rank]
