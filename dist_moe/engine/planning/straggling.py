"""How unevenly experts fall on the nodes that own them, if all experts are equally likely: the busiest one decides.

E experts · K experts per token · N parts (nodes or ranks)
"""

from __future__ import annotations

from functools import lru_cache
from math import comb, sqrt
from statistics import NormalDist

import numpy as np

_SAMPLES = 400
_GRID = np.linspace(-6.0, 6.0, 2401)


def distinct_experts(experts: int, picked: int, tokens: int) -> float:
    """How many experts get at least one of so many tokens that pick `picked` each; the mean."""
    return experts * (1.0 - (1.0 - picked / experts) ** tokens)


def busiest_share(layout: str, experts: int, chunks_per_expert: int, parts: int, distinct: float) -> float:
    """The mean over draws of the share of the read chunks that the busiest part has; 1 / parts is even.

    Args:
        layout: "whole", "sliced" or "shared", as in parallel/plan.py.
        experts: Of a layer; a dense MLP is one, whose chunks every layout deals out.
        chunks_per_expert: Chunks of each.
        parts: That own them.
        distinct: How many experts are read.
    """
    if parts == 1:
        return 1.0
    if experts == 1:
        return -(-chunks_per_expert // parts) / chunks_per_expert
    if layout == "shared":
        return 1.0 / parts
    low = max(1, int(distinct))
    lower, upper = (_drawn_share(layout, experts, chunks_per_expert, parts, min(n, experts)) for n in (low, low + 1))
    return lower + max(0.0, distinct - low) * (upper - lower)


def busiest_tokens(experts: int, picked: int, parts: int, tokens: int) -> float:
    """The mean share of all pairs (token, expert) on the busiest part, whole experts; 1 / parts is even.

    A token's picks on a part are hypergeometric, and many tokens add up to a normal variable.
    """
    if parts == 1 or experts == 1:
        return 1.0 / parts
    share = 1.0 / parts
    variance = picked * share * (1 - share) * (experts - picked) / max(1, experts - 1)
    return min(1.0, share + _normal_maximum(parts) * sqrt(variance / tokens) / picked)


def expected_maximum(sizes: tuple[int, ...], drawn: int) -> float:
    """The mean of the most items that fall on one part when `drawn` of all items are drawn without putting back.

    Exact: the number of draws with at most m items on each part is a coefficient of a product of polynomials.
    """
    least = -(-drawn // len(sizes))  # some part has so many
    draws, most = comb(sum(sizes), drawn), float(least)
    for limit in range(least, min(drawn, max(sizes))):
        most += 1.0 - _draws_up_to(sizes, drawn, limit) / draws
    return most


def _draws_up_to(sizes: tuple[int, ...], drawn: int, limit: int) -> int:
    ways, left = [1], sum(sizes)
    for size in sizes:
        left -= size
        terms = [comb(size, count) for count in range(min(limit, size) + 1)]
        # Fewer than this, and the parts that follow cannot hold the rest.
        fewest = max(0, drawn - left)
        ways = [
            sum(ways[n - k] * term for k, term in enumerate(terms) if 0 <= n - k < len(ways)) if n >= fewest else 0
            for n in range(min(drawn, len(ways) + len(terms) - 2) + 1)
        ]
    return ways[drawn] if drawn < len(ways) else 0


@lru_cache(maxsize=4096)
def _drawn_share(layout: str, experts: int, chunks: int, parts: int, drawn: int) -> float:
    if layout == "whole":
        length, longer = divmod(experts, parts)
        sizes = (length + 1,) * longer + (length,) * (parts - longer)
        return expected_maximum(sizes, drawn) / drawn
    if chunks % parts == 0:
        return 1.0 / parts
    # Chunk c of expert e is on part (e + c) mod N: sampled with a fixed seed, since the parts' loads overlap.
    owned_EN = np.zeros((experts, parts))
    expert_C, chunk_C = np.divmod(np.arange(experts * chunks), chunks)
    np.add.at(owned_EN, (expert_C, (expert_C + chunk_C) % parts), 1)
    generator = np.random.default_rng(0)
    most = [owned_EN[generator.permutation(experts)[:drawn]].sum(axis=0).max() for _ in range(_SAMPLES)]
    return float(np.mean(most)) / (drawn * chunks)


@lru_cache(maxsize=256)
def _normal_maximum(count: int) -> float:
    """The mean of the largest of `count` standard normal variables: the integral of x d(Phi(x)^count)."""
    below = np.array([NormalDist().cdf(x) for x in _GRID]) ** count
    return float(((_GRID[1:] + _GRID[:-1]) / 2 * np.diff(below)).sum())
