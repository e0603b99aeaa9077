"""The sentences of the demo stories: openings, ten plots and endings.

Templates use `{a|b}` for a choice, `%part` for a shared choice of words.PARTS, and slots: `$H` hero, `$F` friend,
`$O` object, `$C` its colour, `$P` `$Q` `$R` places, `$S` a relative or stranger, `$K` `$L` kinds,
`$T` another creature, `$he` `$him` `$his` the hero's pronouns,
`$fhe` `$fhim` `$fhis` the friend's (capitalized: `$He`, `$Fhe` ...). A plot is a list of paragraphs, a paragraph a list
of beats, a beat a list of templates of which a story uses one.
"""

from __future__ import annotations

OPEN_ONCE = [
    "Once upon a time, there was a %little $K named $H.",
    "Once upon a time, a %little $K named $H lived {near|by|beside|not far from} the $P.",
    "Once upon a time, in a {small|white|tiny|warm} house {near|by|beside} the $P, there lived a %little $K named $H.",
    "Once upon a time, {the people|everyone} {near|at|by} the $P knew a %little $K named $H.",
]
OPEN_OTHER = [
    "There once was a %little $K named $H, who lived {near|by|beside} the $P.",
    "In a {small|white|tiny|warm} house {near|by|beside} the $P lived a %little $K named $H.",
    "Long ago, a %little $K named $H lived {near|by|beside|not far from} the $P.",
    "Far away, {beyond|behind|past} the $P, there lived a %little $K named $H.",
    "This is the story of a %little $K named $H, who lived {near|by|beside} the $P.",
]
OWNS = [
    "$He had a $C $O and {loved it very much|took it everywhere|kept it near $his bed|liked to look at it}.",
    "$He loved $his $C $O more than {anything|cake|all other things|the stars}.",
    "$H had a $C $O that {was a gift from|once belonged to|came from} $his $S.",
    "The {best|finest|dearest} thing $he had was a $C $O.",
]
FRIEND = [
    "$His best friend was a %little $L named $F.",
    "Every %morning, $he {played|talked|sang|danced} with a %little $L named $F.",
    "$He had a friend named $F, a %little $L who {lived|worked|slept|played} {near|by|beside} the $Q.",
    "A %little $L named $F was $his {best|dearest|oldest} friend.",
]
DAY = "{One %sunny %morning|The next %morning|On a %sunny %morning|One %morning}"

SORROW = [
    '"{Oh no|Oh dear}, my $O!" {cried|shouted|said} $H. $He was %sad.',
    "$H {sat down|stood} %spot and {cried|was %sad|said nothing}.",
    '"{What can I do now|Where can it be|What should I do}?" {asked|cried|said} $H %low.',
    "$H felt %sad and {thought about|missed} the $C $O.",
]
HELP = [
    (
        '"{Do not cry|Do not worry|Please do not be sad}," said $F %soft. "{We can|We will|Let us|I '
        'will} {help|think|try} {together|again|now}."'
    ),
    '$F {came|ran|hurried} {to help|over|along} and {asked|said}, "{What is wrong|Why are you %sad}, $H?"',
    '"I {will|can|want to} help you, $H," {said|answered} $F %soft.',
    "$F {took|held} $H by the hand and said that {they would|friends always|two friends could} {find a way|help}.",
]
TALK = [
    '"{Look|Come|Wait|Listen}, $F!" {said|cried|called} $H %soft.',
    "$F {laughed|smiled|sang|nodded} and {looked at|listened to|waited for|walked beside} $H.",
    '"{You are|That was} so {kind|good|clever|brave}, $F," said $H %soft.',
    (
        "They {talked|sang|laughed|thought} about {the $O|the weather|the %creature|the $P|dinner} {on "
        "the way|for a while}."
    ),
    "%sky.",
    "They {ate|shared|had} some %food and {rested|sat} %spot.",
    "A %creature {looked at|followed|watched|greeted} $H and $F {from far away|with big eyes|for a while}.",
]
HAPPY = [
    '"{Thank you|Thank you so much|You did it}, $F!" {said|cried} $H %soft.',
    "$H {hugged|thanked|smiled at} $F and held the $O {tight|high|close}.",
    "$H was %glad, and $F was %glad {too|as well}.",
    '"{I am|We are} %glad," {said|cried} $H, and $F {laughed|smiled|clapped|danced}.',
]
ENDINGS = [
    "From that day on, $H and $F {shared|took care of|played with|never lost} the $C $O.",
    (
        "{That night|At last|After dinner}, $H {fell asleep|went to bed|sat by the fire} with the $C $O, "
        "and $F {slept|stayed|sat} near $him."
    ),
    (
        "And {every year|every %morning|whenever it rained|when it was cold}, $H and $F "
        "{talked|laughed|sang|smiled} about the $O."
    ),
    "So $H and $F {went|walked|ran} home with the $C $O and {ate|had} some %food.",
    "The $C $O {made|kept} $H and $F {good friends|happy|close} {for ever|for many years|until they were old}.",
    "$H {put|kept} the $O in a safe place, and $F {came to see|looked at} it {every day|each week|very often}.",
]
MORALS = [
    "%sky.",
    (
        "They {learned|knew|saw} that {a good friend|a kind word|help|a true friend} is {worth|better "
        "than} {more than gold|anything}."
    ),
    "{It was|It had been} a {very good|long|lovely|wonderful} day.",
    "And they {lived|were} {happy|glad} {ever after|for a long time}.",
    "",
]
