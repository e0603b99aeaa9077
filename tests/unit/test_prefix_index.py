"""Which finished sequences stay, which one a prompt begins like, and what goes first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from numpy import array, int32

from dist_moe.engine.requests.prefix_index import PrefixIndex, common_prefix
from dist_moe.model.step import Fork

texts = st.lists(st.integers(0, 2), max_size=9)


@given(texts, texts)
def test_the_common_prefix_is_the_longest_equal_beginning(a: list[int], b: list[int]) -> None:
    found = common_prefix(array(a, int32), array(b, int32))
    assert a[:found] == b[:found]
    assert a[found : found + 1] != b[found : found + 1] or found == min(len(a), len(b))


def test_the_resident_with_most_in_common_is_found() -> None:
    index = PrefixIndex(999)
    index.keep(1, (1, 2, 3, 4))
    index.keep(2, (1, 2, 9))
    index.keep(3, (8,))
    assert index.find((1, 2, 3, 7)) == (1, 3)
    assert index.find((1, 2, 9, 9)) == (2, 3)
    assert index.find((5, 1, 2, 3))[1] == 0
    assert index.find(())[1] == 0


def test_a_beginning_of_another_text_is_not_kept_twice() -> None:
    index = PrefixIndex(999)
    index.keep(1, (1, 2, 3))
    index.keep(2, (1, 2, 3, 4))
    index.keep(3, (1, 2))
    assert (len(index), index.take_orders()[1]) == (1, (1, 3))
    assert index.find((1, 2, 3, 4, 5)) == (2, 4)


def test_the_least_recently_used_goes_first() -> None:
    index = PrefixIndex(3 * 64)
    for name in range(3):
        index.keep(name, (name, *range(60)))
    index.find((0, 0))
    index.keep(3, (3, *range(60)))
    assert index.take_orders() == ((), (1,))
    index.make_room(2)
    assert index.take_orders() == ((), (2, 0))
    index.make_room(3)
    assert (len(index), index.take_orders()) == (0, ((), (3,)))


def test_nothing_is_kept_without_room() -> None:
    index = PrefixIndex(0)
    index.keep(1, (1, 2, 3))
    assert (index.find((1, 2, 3)), index.take_orders()) == ((-1, 0), ((), (1,)))
    index = PrefixIndex(64)
    index.keep(1, range(65))
    assert (len(index), index.take_orders()) == (0, ((), (1,)))


def test_orders_are_given_once_and_forks_in_their_order() -> None:
    index = PrefixIndex(64)
    index.fork(5, 4, 3)
    index.fork(6, 5, 2)
    index.release(4)
    assert index.take_orders() == ((Fork(5, 4, 3), Fork(6, 5, 2)), (4,))
    assert index.take_orders() == ((), ())
