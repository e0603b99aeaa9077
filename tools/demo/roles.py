"""Check that a story keeps its hero, friend and object in their roles: each paragraph must follow the grammar.

The names are replaced by the slots' letters, and the grammar becomes one regular expression per paragraph of a plot. A
story in which hero and friend change places ("Where is my kite?" asked by the friend) fails here.
"""

from __future__ import annotations

import re
from functools import cache

import grammar
import words
from plots import PLOTS

MARKS = {"H": "<hero>", "F": "<friend>", "O": "<object>", "C": "<colour>"}
LISTS = {"K": words.KINDS, "L": words.KINDS, "S": words.PEOPLE, "T": words.CREATURES}
LISTS |= dict.fromkeys("PQR", words.PLACES)
PRONOUN = {"he": "he|she", "him": "him|her", "his": "his|her"}


def slot_pattern(name: str) -> str:
    """What may stand for a slot: its mark, or a word of its list."""
    if name in MARKS:
        return MARKS[name]
    if name in LISTS:
        return f"(?:{'|'.join(LISTS[name])})"
    either = PRONOUN[name.lower().removeprefix("f")]
    return f"(?:{either.title() if name[0].isupper() else either})"


def pattern_of(template: str) -> str:
    """A template as a regular expression."""
    template = re.sub(r"%(\w+)", lambda match: words.PARTS[match[1]], template)
    template = re.sub(r"([.?])", r"\\\1", template).replace("{", "(?:").replace("}", ")")
    template = re.sub(r"\$(\w+)", lambda match: slot_pattern(match[1]), template)
    return re.sub(r"\ba (?=[(<])", "an? ", template)


@cache
def paragraph_patterns() -> list[re.Pattern[str]]:
    """One expression per paragraph of every plot, and those of the openings and the endings."""
    first = grammar.OPEN_ONCE + grammar.OPEN_OTHER
    paragraphs = [[first, grammar.OWNS, grammar.FRIEND], [first, grammar.FRIEND, grammar.OWNS]]
    paragraphs += [paragraph for plot in PLOTS for paragraph in plot]
    paragraphs += [[grammar.ENDINGS, grammar.MORALS], [grammar.ENDINGS]]
    beats = ([f"(?:{'|'.join(map(pattern_of, beat))})" for beat in paragraph] for paragraph in paragraphs)
    return [re.compile(" ".join(parts)) for parts in beats]


def marked(story: str) -> str:
    """The story with the hero's, the friend's and the object's names replaced by marks."""
    names = [word for word in re.findall(r"\w+", story) if word in words.NAMES]
    objects = [word for word in re.findall(r"\w+", story) if word in words.OBJECTS]
    if len(set(names)) != 2 or len(set(objects)) != 1:
        return ""
    hero, thing = names[0], objects[0]
    friend = next(name for name in names if name != hero)
    story = re.sub(rf"\b({'|'.join(words.COLOURS)}) {thing}\b", f"<colour> {thing}", story)
    for word, mark in ((hero, "<hero>"), (friend, "<friend>"), (thing, "<object>")):
        story = re.sub(rf"\b{word}\b", mark, story)
    return story


def roles_kept(story: str) -> bool:
    """Whether every paragraph of a sampled story is one that the grammar could have written."""
    paragraphs = marked(story.removesuffix("<|endoftext|>")).split("\n\n")
    return all(any(pattern.fullmatch(paragraph) for pattern in paragraph_patterns()) for paragraph in paragraphs)
