"""What sampling options may be, on the command line too: a bad one is refused before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dist_moe.engine.requests.request import SamplingOptions
from dist_moe.engine.start.settings import LARGEST_SEED, MOST_BIAS, require_number, require_whole
from dist_moe.errors import UsageError

WHOLE_LIMITS = {
    "top_k": (0, 2**31 - 1),
    "seed": (0, LARGEST_SEED),
    "repeat_last_n": (-1, 2**31 - 1),
    "dry_allowed_length": (1, 2**31 - 1),
    "dry_last_n": (-1, 2**31 - 1),
}
NUMBER_LIMITS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "dry_multiplier": (0.0, 100.0),
    "dry_base": (1.0, 10.0),
}


def check_limits(values: Mapping[str, object]) -> None:
    """Refuse numbers that nothing can be done with.

    Args:
        values: By the option's name; each has limits above.

    Raises:
        UsageError: One of them.
    """
    for name, value in values.items():
        if name in WHOLE_LIMITS:
            require_whole(name, value, *WHOLE_LIMITS[name])
        else:
            require_number(name, value, *NUMBER_LIMITS[name])


def check_sampling(options: SamplingOptions, vocabulary: int, valid_vocabulary: int) -> None:
    """Refuse values that nothing can be done with.

    Args:
        options: How tokens are drawn.
        vocabulary: Tokens that the model has.
        valid_vocabulary: Ids from here on are never drawn.

    Raises:
        UsageError: One of them, or a biased token that the model lacks, or no token is left.
    """
    check_limits({name: getattr(options, name) for name in (*WHOLE_LIMITS, *NUMBER_LIMITS)})
    for pair in options.logit_bias:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise UsageError(f"logit_bias: expected pairs (token, bias), found {pair!r:.80}")
        token, bias = pair
        require_whole("logit_bias: a token", token, 0, vocabulary - 1)
        if bias != -math.inf:
            require_number(f"logit_bias of token {token}", bias, -MOST_BIAS, MOST_BIAS)
    banned = {token for token, bias in options.logit_bias if bias == -math.inf and token < valid_vocabulary}
    if len(banned) == valid_vocabulary:
        raise UsageError("logit_bias bans every token: leave at least one")
    if any(not breaker for breaker in options.dry_breakers):
        raise UsageError("dry_breakers: expected sequences of token ids, found an empty one")
