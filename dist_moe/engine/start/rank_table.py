"""Tables of ranks for error messages and the log: equal ranks share a row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dist_moe.engine.start.record import Record

_MOST_HOSTS = 3


def rank_table(
    records: Sequence[Record], hosts: Sequence[str], names: Sequence[str], odd: Iterable[int] = ()
) -> list[str]:
    """One row per group of ranks that show the same values.

    Args:
        records: By rank.
        hosts: By rank.
        names: Which fields to show.
        odd: Ranks whose rows are marked; they never share a row with others.
    """
    marked = set(odd)
    groups: dict[tuple[object, ...], list[int]] = {}
    for rank, record in enumerate(records):
        key = (rank in marked, *(record.show(name) for name in names))
        groups.setdefault(key, []).append(rank)
    facts = records[0].facts()
    rows = [["ranks", "hosts", *(facts[name].title for name in names), ""]]
    for (is_odd, *values), ranks in groups.items():
        mark = "<- differs" if is_odd else ""
        rows.append([number_runs(ranks), name_hosts(hosts[rank] for rank in ranks), *map(str, values), mark])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def number_runs(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def name_hosts(hosts: Iterable[str]) -> str:
    """Host names, each once; of many, the first few and how many more."""
    names = list(dict.fromkeys(hosts))
    more = len(names) - _MOST_HOSTS
    return ", ".join(names[:_MOST_HOSTS]) + (f" and {more} more" if more > 0 else "")
