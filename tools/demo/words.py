"""The words of the demo stories: names, kinds, objects, colours, places.

The lists are short on purpose: with a vocabulary of 1024 entries every one of these words becomes one or two tokens,
which makes it easy for a small model to copy a name from the beginning of its story to the end.
"""

from __future__ import annotations


def listed(text: str) -> list[str]:
    """The words of a text, as a list."""
    return text.split()


GIRLS = listed("Lily Anna Mia Rosa Nora Emma Ella Lucy Sara Ruby Zoe Ivy")
BOYS = listed("Tom Ben Max Sam Leo Jack Finn Noah Hugo Oscar Tim Paul")
NAMES = GIRLS + BOYS

KINDS = listed("girl boy fox bear rabbit mouse cat dog duck frog sheep squirrel")
OBJECTS = listed(
    "kite ball boat drum bell lamp hat scarf map key book box cup flute ring coat doll basket blanket wagon "
    "whistle feather shell button mirror clock coin ribbon bottle spoon"
)
COLOURS = listed("red blue green yellow silver golden white purple pink old tiny shiny striped pretty")
PEOPLE = listed("grandmother grandfather teacher aunt uncle")
CREATURES = listed("crow goat monkey pony badger wolf hen turtle swan")
PLACES = listed("forest river hill lake garden village meadow farm bridge barn cave beach valley mill tower market")

# Choices that many sentences share; `%name` in a template stands for one of them.
PARTS = {
    "little": "{little|young|small|clever|kind|brave|shy|happy|quiet|funny|gentle|cheerful}",
    "sunny": "{sunny|warm|cold|bright|windy|quiet|foggy|grey|lovely}",
    "morning": "{morning|afternoon|evening|day}",
    "went": "{went|walked|ran|hurried|wandered}",
    "sad": "{sad|upset|worried|unhappy|very sad|so sad|lonely}",
    "glad": "{glad|happy|proud|very happy|so happy|full of joy|cheerful}",
    "said": "{said|whispered|answered|cried|shouted|told}",
    "soft": "{softly|kindly|loudly|at once|with a smile|in a low voice|right away|after a while}",
    "spot": "{under|behind|beside|near} {a tall tree|a big rock|the old gate|some bushes|a pile of leaves|the wall"
    "|a bench|the well|a nest|the long grass|a cart|the fence}",
    "low": "{in a low voice|softly|again|and cried|after a while}",
    "creature": "{" + "|".join(CREATURES) + "}",
    "food": "{bread|cake|apple pie|honey|cheese|soup|plums|berries|nuts|milk}",
    "looked": "{looked|searched|hunted}",
    "time": "{all day|until it got dark|for an hour|for a long time|all morning|until lunch|and did not stop}",
    "sky": "{The sun|The moon|A star|A rainbow|A bird} {was high in|shone in|came out in|could be seen in} the sky",
}
