"""The comparison of hashes, without ranks: what travels, when it counts as different, and who is named."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dist_moe.engine.watch.health import describe_odd_ranks, ranks_differ, to_words

HASHES = (0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 0x0123456789ABCDEF, 0x0123456789ABCDEE, 0x8123456789ABCDEF)
HOSTS = ("a", "a", "b", "c", "c")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_minimum_tells_whether_all_hashes_are_equal(ranks: int) -> None:
    for hashes in itertools.product(HASHES, repeat=ranks):
        lowest = np.min([to_words(found, damaged=False) for found in hashes], axis=0)
        assert ranks_differ(lowest) == (len(set(hashes)) > 1)
        assert lowest[-1] == 0


def test_damage_on_any_rank_reaches_all() -> None:
    words = [to_words(5, damaged) for damaged in (False, True, False)]
    assert np.min(words, axis=0)[-1] < 0


@pytest.mark.parametrize(
    ("hashes", "names"),
    [
        ("xxyxx", "rank 2 (b) holds other numbers than the other ranks"),
        ("yxxxx", "rank 0 (a) holds other numbers than the other ranks"),
        ("yxxxz", "rank 0 (a) and rank 4 (c) hold other numbers than the other ranks"),
        ("xy", "rank 1 (a) holds other numbers than rank 0 (without a majority"),
        ("xyzuv", "rank 1 (a) and rank 2 (b) and rank 3 (c) and rank 4 (c) hold other numbers than rank 0 (without"),
        ("xxyy", "rank 2 (b) and rank 3 (c) hold other numbers than rank 0 (without a majority"),
        ("zxxyy", "rank 0 (a) and rank 3 (c) and rank 4 (c) hold other numbers than rank 1 (without a majority"),
    ],
)
def test_the_ranks_that_differ_from_most_are_named(hashes: str, names: str) -> None:
    text = describe_odd_ranks(hashes, HOSTS, 65, 128)
    assert text.startswith(names)
    assert "steps 65 to 128" in text
