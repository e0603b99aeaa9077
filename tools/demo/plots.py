"""The ten plots of the demo stories, in the notation of grammar.py."""

from __future__ import annotations

from grammar import DAY, HAPPY, HELP, SORROW, TALK

LOST = [
    [
        [
            DAY + ", $H could not find the $O.",
            DAY + ", $H %went to the $Q and lost the $O.",
            DAY + ", the $C $O was {gone|not there|lost}, and $H did not know {why|where it was}.",
        ],
        ["$H %looked %spot, but {found nothing|it was not there|the $O was not there}."],
        SORROW,
        HELP,
    ],
    [
        [
            "They %looked for the $O {at|near|around} the $Q and {at|near|around} the $R %time.",
            "$H %went to the $Q, and $F %went to the $R.",
            "First, $H and $F {asked|met} a %creature {at|near} the $Q, but it {had not seen|did not have} the $O.",
        ],
        TALK,
        [
            "{Then|At last|Suddenly}, $F saw {something|the $C $O} %spot. It was the $O of $H!",
            '"{Look|Here it is|Come}, $H!" {cried|shouted} $F. The $C $O was %spot.',
            "{Then|At last|Suddenly}, they found the $O %spot, {wet|dirty|cold|dusty} but {safe|not broken}.",
        ],
        HAPPY,
    ],
]
BROKEN = [
    [
        [
            DAY + ", $H {fell|slipped} near the $Q, and the $O broke.",
            DAY + ", a %creature {sat|jumped|stepped} on the $O and broke it.",
            DAY + ", $H dropped the $C $O %spot, and it broke {in two|into three pieces}.",
        ],
        SORROW,
        HELP,
    ],
    [
        [
            "$F {brought|found|had} some {glue|string|paint|wax|thread} {at|from} the $R.",
            "$H {carried|took|brought} the $O to the $R, where $F {worked|had a table|kept some glue}.",
        ],
        ["They {worked|tried} %time, and $H {held|turned|washed} the $O while $F {fixed|painted|dried} it."],
        TALK,
        [
            "{Soon|At last|In the end}, the $O was {as good as new|better than before|whole again}.",
            '"{Look|Here you are}, $H," said $F. "{Your|The} $O is {as good as new|whole again}."',
        ],
        HAPPY,
    ],
]
GIFT = [
    [
        [
            DAY + ", $H {heard|saw|learned} that $F was %sad.",
            "It was {almost|nearly} the birthday of $F, and $H wanted to {give|find} $fhim a {gift|surprise}.",
        ],
        [
            '"{What|Which gift} would make $F %glad?" thought $H {near|at|by} the $Q.',
            "$H {thought|wondered} {about it|what to do} %time and {looked at|held} the $O.",
        ],
        [
            "Then $he {knew|saw}: $F {had always|always} {liked|loved|wanted} the $C $O.",
            "So $H {washed|cleaned|painted} the $C $O and {hid|put} it %spot.",
        ],
    ],
    [
        ["$H %went {past|along|over} the $Q to {meet|see|find} $F {at|near} the $R."],
        ['"{This is|I have something|Here is a gift} for you, $F," said $H %soft and gave $fhim the $O.'],
        [
            '"{Is it|Can it be} for me?" asked $F. "{I love|What a lovely|I always wanted} {your|a|this} $O, $H!"',
            "$F {looked at|held} the $C $O {for a long time|with big eyes} and hugged $H.",
        ],
        TALK,
        ["$H was %glad, {because|for} $F was %glad {too|again}."],
    ],
]
SHARE = [
    [
        [
            DAY + ", $F {came to|met $H at} the $Q and {saw|asked about} the $C $O.",
            DAY + ", $H {played with|showed|carried} the $O {near|at} the $Q, and $F {watched|came along}.",
        ],
        ['"{Can I|May I} {hold|try|have} the $O {for a while|too|now}, $H?" asked $F %soft.'],
        [
            '"No," said $H. "{It is|This is} my $O."',
            '"{Go away|Not now}, $F," said $H. "The $O is {mine|only for me}."',
        ],
        ["$F {went|walked|ran} {home|away} to the $R and was %sad."],
    ],
    [
        [
            "$H {sat|stayed} {near|at} the $Q %time, but it was no fun to be with the $O and without $F.",
            "{Soon|That night|Later}, $H felt %sad, {because|for} the $O was {no fun|nothing} without $F.",
        ],
        ["So $H took the $C $O and %went to the $R to {find|look for|meet} $F."],
        ['"{I am sorry|Please forgive me}, $F," said $H %soft. "{We can|Let us} {share|both have} the $O."'],
        TALK,
        HAPPY,
    ],
]
FOUND = [
    [
        [
            DAY + ", $F {came|ran} to the $Q and was %sad. $Fhe had lost {some %food|the way}.",
            DAY + ", $F {got lost|did not come home} in the fog near the $Q.",
        ],
        [
            "$H {heard|learned} about it from a %creature and took the $O along.",
            "$H {took|picked up} the $C $O and %went to {help|find} $F.",
        ],
        ['"{Where are you|Can you hear me|Wait for me}, $F?" {called|shouted|cried} $H {near|at} the $R.'],
    ],
    [
        [
            "$H {held up|waved|shook} the $O {again and again|%time}, and {at last|soon} $F {saw|heard} it.",
            "$F {saw|heard} the $C $O of $H from {far away|the $R} and {came|ran} {closer|over}.",
        ],
        ['"{I was %sad|I was afraid|I was cold}, $H," said $F %soft. "{Your|The} $O {saved|helped} me."'],
        TALK,
        ["$H {gave|brought} $F some %food, and they {went|walked} {home|back} with the $O."],
    ],
]
STORM = [
    [
        [
            DAY + ", a {strong|cold|wild} wind {blew|came} {over|from} the $Q and {took|carried off} the $O.",
            DAY + ", it {rained|snowed} so {hard|much} that the $O {fell|was washed} into the water near the $Q.",
            DAY + ", the wind {threw|blew|carried} the $C $O to the top of the $Q.",
        ],
        SORROW,
        HELP,
    ],
    [
        [
            (
                "$F {took|found} a long {stick|rope|branch} and {ran|went|climbed} after the $O, and $H "
                "{held|helped} $fhim."
            ),
            "$H and $F {ran|went|climbed} after the $O {as far as|all the way to|past} the $R.",
        ],
        TALK,
        [
            "{Then|At last|Suddenly}, the wind {stopped|turned}, and $F {caught|got hold of|picked up} the $O.",
            "{Then|At last|Suddenly}, the $C $O {fell|came} down %spot, and $F {caught|picked up|ran to get} it.",
        ],
        HAPPY,
    ],
]
QUEST = [
    [
        [
            DAY + ", $H had to {bring|carry|take} the $C $O to $his $S, {beyond|behind|past} the $Q.",
            DAY + ', $H said, "I must {bring|carry|take} this $O to my $S {at|near|by} the $Q."',
        ],
        ['"{It is far|The way is long|It may rain}," said $F. "{I will|Let me} {come|go} with you, $H."', HELP[2]],
        ["$H {packed|took} the $O and some %food, and $F {took|found} a {stick|rope|branch}."],
    ],
    [
        [
            "They %went {past|along|over} the $R %time, and $F {carried|held} the $O {for a while|when $H was tired}.",
            "{At|Near} the $R, a {big|thin|angry|hungry} $T {stood|sat} in the way and wanted the $O.",
        ],
        TALK,
        ['"{Are we there|Is it far|Can you go on}?" asked $F. "{Almost|Not far now|Soon|Yes}," said $H %soft.'],
        ["{Then|At last|In the end}, they {came|got} to the $Q, and $H {gave|showed} the $O to the old $S."],
        ["The $S was %glad and {gave|brought} $H and $F some %food."],
    ],
]
THIEF = [
    [
        [
            DAY + ", a {big|thin|angry|hungry} $T {took|stole|ran off with} the $O of $H.",
            DAY + ", while $H {slept|rested|played} {near|at} the $Q, a $T {took|stole} the $C $O.",
        ],
        SORROW,
        ["$F had seen it {all|too} and %went after the $T with $H.", HELP[2]],
    ],
    [
        [
            "They {found|met|saw} the thief {at|near|by} the $R. It {sat|slept|stood} %spot with the $O.",
            "The thief ran {past|along|over} the $Q to the $R, but $H and $F {were faster|did not stop}.",
        ],
        ['"{Please|You must|Will you please} give {back the|us the|me my} $O," said $H %soft.'],
        ['"{I only wanted|I just wanted} {a friend|to play|to look at it|something nice}," {said|answered} the thief.'],
        ["$F gave {it|the thief} some %food, and $H {got|took} the $C $O back."],
        TALK,
        HAPPY,
    ],
]
CONTEST = [
    [
        [
            DAY + ", there was a {big|great|merry} {party|contest|feast} {at|near|by} the $Q.",
            DAY + ", the $S {asked|called} everyone to a {big|great|merry} {party|contest|feast} {at|near} the $Q.",
        ],
        ['"I {will|want to} {show|bring|take} my $O," said $H. "{Will you|Can you} {help|come}, $F?"'],
        ['"{Yes|Of course|I would love to}," said $F %soft, and they {cleaned|washed|painted} the $O %time.'],
    ],
    [
        [
            "{At|On the way to} the $Q, $H was %sad, {because|for} {many|all} others {laughed|looked} at the $O.",
            "{Many|All} people {came|had come} from the $R, and $H was too {shy|afraid} to show the $O.",
        ],
        ['"{Your|The} $O is the best {of all|here|I know}, $H," said $F %soft.', HELP[3]],
        TALK,
        [
            (
                "{Then|At last|In the end}, $H {showed|held up} the $C $O, and {everyone|all the people} "
                "{clapped|cheered}."
            ),
            "{Then|At last|In the end}, the $S {gave|brought} {the prize|first prize} to $H for the $C $O.",
        ],
        HAPPY,
    ],
]
WISH = [
    [
        [
            DAY + ", $H {found|learned|heard} that the $O {was magic|could talk|could grant a wish}.",
            DAY + ", a {kind|tiny} %creature {told|showed} $H that the $C $O {was magic|could grant a wish}.",
        ],
        ['"{What|Which wish} {should|would} you {choose|like}, $F?" asked $H {near|at} the $Q.'],
        ['"I {wish for|want|would like} {%food|snow|a garden|a song|a long walk to the $R}," said $F %soft.'],
        ["$H {held|shook|turned} the $O {three times|again and again}, but nothing happened, and $he was %sad."],
    ],
    [
        TALK,
        [
            (
                '"{Do not worry|It does not matter}, $H," said $F. "{You are|A friend is} {better than|worth '
                'more than} any {wish|magic}."'
            )
        ],
        [
            (
                "{Then|Suddenly|At that}, the $C $O {shone|moved|sang|was warm}, and {snow|a song|a light} "
                "{came|fell} {from|over} the $R."
            )
        ],
        HAPPY,
    ],
]
PLOTS = [LOST, BROKEN, GIFT, SHARE, FOUND, STORM, QUEST, THIEF, CONTEST, WISH]
