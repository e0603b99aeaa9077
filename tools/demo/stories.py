"""Write the text that the demo model learns: short stories from a grammar, and a few chats about them.

A story is a pure function of (seed, index), so any script can make the training text again instead of storing it.

    python tools/demo/stories.py --count 5                        # print some
    python tools/demo/stories.py --heldout --bytes 60000          # the text that training never sees
"""

from __future__ import annotations

import argparse
import random
import re
from dataclasses import dataclass

import grammar
import words
from plots import PLOTS

TRAIN_SEED, HELDOUT_SEED = 1, 2
END_OF_TEXT = "<|endoftext|>"
CHAT_SHARE = 0.08
CHOICE = re.compile(r"\{([^{}]*)\}")
SLOT = re.compile(r"\$(\w+)")
PART = re.compile(r"%(\w+)")
PRONOUNS = {True: ("she", "her", "her"), False: ("he", "him", "his")}
ASKS = [
    "Tell me a story about $H and a $O.",
    "Tell me a story about a $O.",
    "Tell me a story about $H.",
    "Tell me a story about $H and $F.",
    "Tell me a story.",
    "Can you tell me a story about a $C $O?",
    "Please write a short story about $H, $F and a $O.",
    "I would like a story about a $K named $H.",
]
SYSTEMS = ["You are a kind teller of short stories.", "You tell short stories.", "You are a helpful teller of stories."]
QUESTIONS = [
    ("Who is the hero of the story?", "The hero is $H, a $K."),
    ("Who is the friend in the story?", "The friend is $F, a $L."),
    ("What does the hero have?", "$H has a $C $O."),
    ("Where does $H live?", "$H lives near the $P."),
    ("Thank you!", "You are welcome. I hope that you liked $H and $F."),
]


@dataclass(frozen=True)
class Story:
    """One story: its text and what it is about (the slots that filled its templates)."""

    text: str
    slots: dict[str, str]


def cast(rng: random.Random) -> dict[str, str]:
    """Choose who and what a story is about: values for all slots, capitalized pronouns included."""
    hero, friend = rng.sample(words.NAMES, 2)
    place, second, third = rng.sample(words.PLACES, 3)
    kinds = rng.sample([kind for kind in words.KINDS if kind not in ("girl", "boy")], 2)
    slots = {"H": hero, "F": friend, "P": place, "Q": second, "R": third, "S": rng.choice(words.PEOPLE)}
    slots["T"] = rng.choice(words.CREATURES)
    slots |= {"O": rng.choice(words.OBJECTS), "C": rng.choice(words.COLOURS)}
    for name, kind_slot, prefix, kind in ((hero, "K", "", kinds[0]), (friend, "L", "f", kinds[1])):
        is_girl = name in words.GIRLS
        slots[kind_slot] = kind if rng.random() < 0.6 else ("girl" if is_girl else "boy")
        for role, pronoun in zip(("he", "him", "his"), PRONOUNS[is_girl], strict=True):
            slots[prefix + role] = pronoun
            slots[(prefix + role).capitalize()] = pronoun.capitalize()
    return slots


def expand(template: str, slots: dict[str, str], rng: random.Random) -> str:
    """Fill one template: shared parts, then choices from the innermost outwards, then slots."""
    template = PART.sub(lambda match: words.PARTS[match[1]], template)
    while CHOICE.search(template):
        template = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
    text = SLOT.sub(lambda match: slots[match[1]], template)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def opening(rng: random.Random) -> list[list[str]]:
    """Beats of the first paragraph: more than half of all stories begin with "Once upon a time"."""
    first = grammar.OPEN_ONCE if rng.random() < 0.6 else grammar.OPEN_OTHER
    middle = [grammar.OWNS, grammar.FRIEND]
    rng.shuffle(middle)
    return [first, *middle]


def make_story(seed: int, index: int) -> Story:
    """The story with this number: an opening, one plot's paragraphs, an ending."""
    rng = random.Random(f"{seed}/{index}")
    slots = cast(rng)
    paragraphs = [opening(rng), *rng.choice(PLOTS), [grammar.ENDINGS, grammar.MORALS]]
    filled = []
    for beats in paragraphs:
        sentences = (expand(rng.choice(beat), slots, rng) for beat in beats)
        filled.append(" ".join(sentence for sentence in sentences if sentence))
    return Story("\n\n".join(filled), slots)


def make_chat(story: Story, rng: random.Random) -> str:
    """A ChatML conversation in which the assistant tells this story, as the model's chat template writes it."""
    parts = []
    if rng.random() < 0.5:
        parts.append(f"<|im_start|>system\n{rng.choice(SYSTEMS)}<|im_end|>\n")
    parts.append(f"<|im_start|>user\n{expand(rng.choice(ASKS), story.slots, rng)}<|im_end|>\n<|im_start|>assistant\n")
    plan = expand("A story about $H, $F and a $C $O.\n", story.slots, rng) if rng.random() < 0.5 else "\n"
    thinking, question = f"<think>\n{plan}</think>\n\n", rng.choice([None, *QUESTIONS])
    if question is None:
        return "".join(parts) + thinking + story.text + "<|im_end|>\n" + END_OF_TEXT
    ask, answer = (expand(text, story.slots, rng) for text in question)
    parts.append(f"{story.text}<|im_end|>\n<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n")
    return "".join(parts) + f"<think>\n\n</think>\n\n{answer}<|im_end|>\n" + END_OF_TEXT


def make_document(seed: int, index: int) -> str:
    """The training document with this number: a story, or in a few cases a chat, with the end-of-text token."""
    story, rng = make_story(seed, index), random.Random(f"{seed}/{index}/chat")
    return make_chat(story, rng) if rng.random() < CHAT_SHARE else story.text + END_OF_TEXT


def heldout(size: int) -> str:
    """Held-out stories (no chats), one after another, at most `size` bytes."""
    text, index = "", 0
    while True:
        document = make_story(HELDOUT_SEED, index).text + END_OF_TEXT
        if len(text) + len(document) > size:
            return text
        text, index = text + document, index + 1


def main() -> None:
    """Print training documents, or the held-out text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=3, help="documents to print")
    parser.add_argument("--heldout", action="store_true", help="print the held-out text instead")
    parser.add_argument("--bytes", type=int, default=60_000, help="size of the held-out text")
    args = parser.parse_args()
    if args.heldout:
        print(heldout(args.bytes), end="")
    for index in range(0 if args.heldout else args.count):
        print(make_document(TRAIN_SEED, index), end="\n\n")


if __name__ == "__main__":
    main()
