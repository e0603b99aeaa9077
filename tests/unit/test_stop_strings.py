"""Stop strings against their definition: one look at the whole text, character by character."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from dist_moe.text.stop_strings import StopStrings

# Two letters, so that strings overlap, nest and repeat themselves.
LETTERS = some.text("ab", max_size=20)
STOPS = some.lists(some.text("ab", min_size=1, max_size=4), max_size=5)


def defined(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What is shown of a text, and the stop string that ended it: the first to be complete, the longest of those."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


@settings(max_examples=1000)
@given(LETTERS, STOPS, some.lists(some.integers(0, 30), max_size=8))
def test_any_cut_of_a_text_gives_what_the_definition_says(text: str, stops: list[str], places: list[int]) -> None:
    matcher = StopStrings(stops)
    shown = "".join([*map(matcher.push, cut(text, places)), matcher.finish()])
    assert (shown, matcher.found) == defined(text, stops)


@given(LETTERS, STOPS)
def test_text_is_shown_as_soon_as_it_cannot_belong_to_a_stop_string(text: str, stops: list[str]) -> None:
    matcher, shown = StopStrings(stops), ""
    for end, character in enumerate(text, 1):
        shown += matcher.push(character)
        if matcher.found is not None:
            break
        held = max(
            (n for n in range(end + 1) if any(stop[:n] == text[end - n : end] and n < len(stop) for stop in stops)),
            default=0,
        )
        assert shown == text[: end - held]


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "found"),
    [
        (["one\nUs", "er: two"], ["\nUser:"], "one", "\nUser:"),
        (["aab"], ["ab", "aab"], "", "aab"),
        (["abc"], ["abcd", "b"], "a", "b"),
        (["ab", "ab", "x"], ["ababc"], "ababx", None),
        (["ab", "ab"], ["ababc"], "abab", None),
        (["a", "", "b"], [], "ab", None),
    ],
)
def test_borders_overlaps_and_ends(pieces: list[str], stops: list[str], shown: str, found: str | None) -> None:
    matcher = StopStrings(stops)
    assert "".join([*map(matcher.push, pieces), matcher.finish()]) == shown
    assert matcher.found == found
    assert matcher.push("more") == ("" if found else "more")


def test_nothing_is_shown_after_a_stop_string() -> None:
    matcher = StopStrings(["stop"])
    assert matcher.push("go stop go") == "go "
    assert (matcher.push("on"), matcher.finish()) == ("", "")
