"""What a caller asks of the engine, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from dist_moe.errors import DistMoeError, UsageError
from dist_moe.kernels import NO_FAULT
from dist_moe.model_config import ModelConfig

FinishReason = Literal["stop", "length", "error", "interrupted", "context", "stop_string"]
LogitsCallback = Callable[[npt.NDArray[np.float32]], None]

# What the fault kinds of csrc/dist_moe.h mean, in their order.
_FAULTS = {
    1: "a NaN or infinity in an activation to be quantized",
    2: "a NaN or infinity in a key or value",
    3: "a NaN or a value beyond 2^18 in a unit's contribution",
    4: "a sum beyond 2^51 in fixed point",
    5: "a NaN or infinity in a router logit",
    6: "a NaN or infinity in a logit",
}


def describe_fault(fault: int, layers: int) -> str:
    """One clause that names the layer and the kind of a token's fault (layer << 8 | kind)."""
    layer, kind = fault >> 8, fault & 0xFF
    where = f"layer {layer}" if layer < layers else "the final norm and lm_head"
    return f"{_FAULTS[kind]} in {where}"


def check_prompt(ids: Sequence[int], context: int, config: ModelConfig) -> None:
    """Refuse a prompt that cannot be computed.

    Args:
        ids: Its tokens.
        context: Positions of a sequence at most.
        config: The model's sizes.

    Raises:
        UsageError: It is empty, longer than the context, or has an id beyond the vocabulary.
    """
    if not ids:
        raise UsageError("the prompt has no tokens: give at least one")
    if len(ids) > context:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, the context {context}: shorten it or raise --ctx "
            f"(the model allows {config.max_positions})"
        )
    beyond = next((i for i in ids if not 0 <= i < config.vocabulary), None)
    if beyond is not None:
        raise UsageError(f"token id {beyond} is outside the model's vocabulary: 0 to {config.vocabulary - 1}")


def refuse_faults(fault_T: npt.NDArray[np.int32], first_position: int, layers: int) -> None:
    """Raise DistMoeError if a token of a text, of which `first_position` were computed before, has a fault."""
    fault = int(fault_T.min())
    if fault != NO_FAULT:
        raise DistMoeError(f"position {first_position + int(fault_T.argmin())}: {describe_fault(fault, layers)}")


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn, in this order (docs/sampling.md has the definitions).

    Logits are changed by `logit_bias`, the repetition penalty, the presence and frequency penalties and DRY; divided by
    `temperature` (0 takes the best token); then top-k, top-p of what is left, min-p and typical-p choose among them.
    `top_k` 0, `top_p` 1, `min_p` 0, `typical_p` 1, `repetition_penalty` 1 and the others at 0 are off. A `..._last_n`
    counts tokens back from the end, prompt included; -1 is all of them.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # of tokens of the prompt and the completion
    repeat_last_n: int = -1
    presence_penalty: float = 0.0  # of tokens of the completion
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = -1
    dry_breakers: frozenset[tuple[int, ...]] = frozenset()  # tokens over which DRY sees no repetition
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added); -infinity bans it

    @property
    def changes_logits(self) -> bool:
        """Whether anything but the temperature changes a logit."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.dry_multiplier != 0
            or bool(self.logit_bias)
        )


@dataclass(frozen=True)
class Request:
    """One sequence to continue.

    Attributes:
        prompt_ids: At least one token.
        max_tokens: Tokens to generate at most.
        sampling: How they are drawn.
        stop_ids: Tokens that end the sequence (they are part of the completion).
        on_logits: Told each generated token's logits, f32 [V], valid only during the call.
        sample: Which of several independent continuations of one prompt: it keys the random numbers with the seed.
        logprobs: How many of the best tokens to note at each place with their log-probabilities, besides the one that
            was drawn; None notes none at all.
        continued: So many of the prompt's last tokens were generated before: penalties count them as such.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingOptions = SamplingOptions()
    stop_ids: frozenset[int] = frozenset()
    on_logits: LogitsCallback | None = None
    sample: int = 0
    logprobs: int | None = None
    continued: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability, and the best tokens of its place with theirs.

    They are the model's own, at temperature 1, before penalties and filters.
    """

    id: int
    logprob: float
    best: tuple[tuple[int, float], ...] = ()


def total_logprob(tokens: Iterable[TokenLogprob]) -> float:
    """The log-probability of some tokens together, added in their order: the same bits as a beam's."""
    total = 0.0  # not sum(), which compensates from Python 3.12 on (NUMERICS rule 3)
    for token in tokens:
        total += token.logprob
    return total


@dataclass
class Completion:
    """A finished (or growing) sequence.

    `finish_reason` is `stop` (a stop id was drawn), `stop_string` (the text met one), `length` (max_tokens), `context`
    (its end), `interrupted` (by the user) or `error` (then `error` says what went wrong and where). `reused_tokens` of
    the prompt were not computed anew: another sequence had their keys and values.
    """

    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    reused_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def cumulated_logprob(self) -> float:
        """The log-probability of the whole completion; 0 unless the request asks for logprobs."""
        return total_logprob(self.logprobs)
