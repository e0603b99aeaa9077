"""How units are dealt out, to shards and to ranks alike: pure functions of the counts, never of the machine."""

from __future__ import annotations

from collections.abc import Sequence

# Rows of lm_head that one rank owns together (NUMERICS rule 13).
VOCABULARY_BLOCK = 128


def contiguous(total: int, parts: int, index: int) -> range:
    """Part `index` of `total` items cut into `parts` contiguous runs whose lengths differ by at most one.

    The longer runs come first; a part may be empty.
    """
    length, longer = divmod(total, parts)
    first = index * length + min(index, longer)
    return range(first, first + length + (index < longer))


def weighted(total: int, weights: Sequence[int]) -> list[range]:
    """`total` items cut into contiguous runs by weight, one per weight, ends rounded to the nearest item.

    Where there are enough items, each run gets at least one.
    """
    parts, whole, before, first = len(weights), sum(weights), 0, 0
    runs = []
    for index, weight in enumerate(weights):
        before += weight
        stop = (2 * total * before + whole) // (2 * whole)
        if total >= parts:
            stop = min(max(stop, first + 1), total - (parts - 1 - index))
        runs.append(range(first, stop))
        first = stop
    return runs


def whole_chunks(experts: int, chunks_per_expert: int, parts: int, index: int) -> range:
    """The linear chunk indices (expert * chunks_per_expert + chunk) of a part that owns whole experts.

    A dense MLP is one expert, which would land on one part alone: its chunks are dealt out instead.
    """
    if experts == 1:
        return contiguous(chunks_per_expert, parts, index)
    owned = contiguous(experts, parts, index)
    return range(owned.start * chunks_per_expert, owned.stop * chunks_per_expert)


def sliced_chunks(experts: int, chunks_per_expert: int, parts: int, index: int) -> list[int]:
    """The linear chunk indices of a part when chunk c of expert e belongs to part (e + c) mod parts."""
    return [
        expert * chunks_per_expert + chunk
        for expert in range(experts)
        for chunk in range(chunks_per_expert)
        if (expert + chunk) % parts == index
    ]


def head_range_kv_heads(heads: range, heads_per_kv_head: int) -> range:
    """The KV heads that a contiguous range of query heads reads."""
    if not heads:
        return range(0)
    return range(heads.start // heads_per_kv_head, (heads.stop - 1) // heads_per_kv_head + 1)
