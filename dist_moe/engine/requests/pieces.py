"""What comes out of the engine: pieces while a text grows, and whole results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_moe.engine.requests.request import FinishReason, TokenLogprob, total_logprob
from dist_moe.text.messages import ToolCall

__all__ = ["FinishReason", "Piece", "Result", "TokenLogprob", "Usage"]


@dataclass(frozen=True)
class Piece:
    """What one step adds to one sequence.

    Attributes:
        text: What can be shown now. Half a character, and what may be the beginning of a stop string, wait for a later
            piece. Empty for a model without a tokenizer.
        ids: The tokens of the step: one, or none in a last piece.
        index: Which of the prompts it continues.
        finish_reason: In a sequence's last piece: `stop` (a token that ends a text), `stop_string`, `length`
            (max_tokens), `context` (its end), `interrupted` or `error`.
        stop: With `stop_string`: which one.
        error: With `error`: what went wrong, and where.
        reasoning: In a chat: what the model thinks before its answer.
        tool_calls: In a chat: calls that are complete.
        notes: In a chat: why a call stayed text.
        logprob: The token's log-probability, and the best ones of its place, if that was asked for.
    """

    text: str
    ids: tuple[int, ...] = ()
    index: int = 0
    finish_reason: FinishReason | None = None
    stop: str | None = None
    error: str | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    notes: tuple[str, ...] = ()
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of one sequence; `reused_tokens` of the prompt were known from an earlier one."""

    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Result:
    """A finished sequence: the sum of its pieces, which see for `finish_reason`, `stop` and `error`.

    Attributes:
        text: Without the tokens that end a text, and without the stop string.
        ids: All generated tokens, those two included.
        sample: Of several samples: which; see `Engine.complete_several`, also for the next two.
        score: What several texts are ranked by.
        logprobs: Each token's log-probability, and the best tokens of its place.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    stop: str | None = None
    error: str | None = None
    sample: int | None = None
    score: float | None = None
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def logprob(self) -> float:
        """The log-probability of all tokens together; 0 if none were noted."""
        return total_logprob(self.logprobs)

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> Result:
        """The inverse of `dataclasses.asdict`, after a journey as JSON."""
        logprobs = tuple(
            TokenLogprob(token["id"], token["logprob"], tuple((id_, logprob) for id_, logprob in token["best"]))
            for token in values["logprobs"]
        )
        usage = Usage(**values["usage"])
        return cls(**{**values, "ids": tuple(values["ids"]), "usage": usage, "logprobs": logprobs})
