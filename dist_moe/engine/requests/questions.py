"""From what a caller asks to requests: prompts become tokens, options are checked and completed by the model's own."""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from dist_moe import files
from dist_moe.engine.requests.request import LogitsCallback, Request, SamplingOptions
from dist_moe.engine.requests.sampling_limits import check_limits, check_sampling
from dist_moe.engine.start.settings import DEFAULT_MAX_TOKENS, MOST_LOGPROBS, require_whole
from dist_moe.errors import UsageError
from dist_moe.model_config import ModelConfig
from dist_moe.text.chat import ChatFormat
from dist_moe.text.generation_config import read_generation_config
from dist_moe.text.tokenizer import TOKENIZER_FILE, Tokenizer

Prompt = str | Sequence[int]
logger = logging.getLogger(__name__)
_DRAWN = ("temperature", "top_k", "top_p", "min_p", "seed")  # options that change the sampling


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of `Engine.generate`, `chat` and `complete`. None: as the model's makers advise.

    Attributes:
        max_tokens: Tokens to generate at most (256).
        temperature: 0 takes the best token; higher is more random.
        top_k: Draw from the k best tokens; 0 is off.
        top_p: Draw from the best tokens that reach this probability; 1 is off.
        min_p: Leave out tokens less probable than this share of the best one's; 0 is off.
        seed: Of the random numbers (0): the same seed gives the same text, on any number of ranks.
        sampling: All of how to draw, instead of the model's advice; the arguments above change it.
        stop: A string before which the text ends, or several; never part of the text.
        ignore_eos: Go on past the tokens that end a text.
        logprobs: Note with each token its log-probability, and so many of the best ones; the model's own, at
            temperature 1, before penalties and filters.
        continued: So many of the last tokens of the prompt (0) count as generated for presence and frequency penalties.
        on_logits: Told each generated token's logits, f32 [V], valid only during the call; for one prompt.
        interrupted: Asked after each step whether to end now, with the finish reason `interrupted`.
    """

    max_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    sampling: SamplingOptions | None
    stop: str | Sequence[str]
    ignore_eos: bool
    logprobs: int | None
    continued: int
    on_logits: LogitsCallback | None
    interrupted: Callable[[], bool] | None


@dataclass(frozen=True)
class Wishes:
    """`GenerateOptions` with their defaults."""

    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    sampling: SamplingOptions | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    continued: int = 0
    on_logits: LogitsCallback | None = None
    interrupted: Callable[[], bool] | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings before which a text ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def require_valid(self, *, several: bool = False) -> None:
        """Refuse values that nothing can be done with.

        Args:
            several: Whether there is more than one prompt.

        Raises:
            UsageError: One of them.
        """
        if several and self.on_logits is not None:
            raise UsageError("on_logits: it is told no prompt's index: give one prompt at a time")
        require_whole("max_tokens", self.max_tokens, 1, 2**31 - 1)
        check_limits({name: getattr(self, name) for name in _DRAWN if getattr(self, name) is not None})
        require_whole("continued", self.continued, 0, 2**31 - 1)
        if self.logprobs is not None:
            require_whole("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if self.sampling is not None and not isinstance(self.sampling, SamplingOptions):
            raise UsageError(f"sampling: expected SamplingOptions, found {self.sampling!r:.80}")
        if not isinstance(self.stop, Iterable):
            raise UsageError(f"stop: expected a text or several, found {self.stop!r}")
        for string in self.stop_strings:
            if not isinstance(string, str) or not string:
                raise UsageError(f"stop: expected a text of at least one character, or several, found {string!r}")


class TextSide:
    """A model's text files: read when they are first needed.

    Attributes:
        directory: Where they lie.
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        """Remember where they lie.

        Args:
            directory: A store, a checkpoint, or what was written of a GGUF file.
            config: The model's sizes.
        """
        self.directory = directory
        self._config = config
        self.advised = read_generation_config(directory)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, or None if it has none.

        Raises:
            CheckpointError: It is damaged.
        """
        return Tokenizer(self.directory) if files.exists(self.directory / TOKENIZER_FILE) else None

    def require_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        return self.tokenizer or Tokenizer(self.directory)

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """How the model frames conversations.

        Raises:
            CheckpointError: It has no chat template.
        """
        return ChatFormat.read(self.directory, self.require_tokenizer())

    @property
    def valid_vocabulary(self) -> int:
        """Ids from here on mean nothing and are never drawn."""
        tokenizer = self.tokenizer
        return min(self._config.vocabulary, tokenizer.size if tokenizer else self._config.vocabulary)

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        return known_stop_ids(self.advised.stop_ids, self.tokenizer, self._config.vocabulary)

    def sampling(self, wishes: Wishes) -> SamplingOptions:
        """How to draw: as wished, else as the model's makers advise."""
        if wishes.sampling is not None:
            base = wishes.sampling
        else:
            names = {name for name in vars(self.advised) if hasattr(SamplingOptions, name)}
            base = SamplingOptions(**{name: getattr(self.advised, name) for name in names})
        chosen = {name: getattr(wishes, name) for name in _DRAWN}
        return replace(base, **{name: value for name, value in chosen.items() if value is not None})

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """A prompt's tokens.

        Raises:
            UsageError: It is neither text nor whole numbers, has no tokens, or one that the model lacks.
            CheckpointError: It is text, and the model has no tokenizer.
        """
        if isinstance(prompt, str):
            tokenizer = self.require_tokenizer()
            ids = tokenizer.encode(prompt)
            if not ids and tokenizer.bos_id is None:
                raise UsageError("the prompt is empty and this model has no token that begins a text: give some text")
            ids = ids or [int(tokenizer.bos_id or 0)]
        else:
            ids = whole_numbers(prompt)
        beyond = next((i for i in ids if not 0 <= i < self._config.vocabulary), None)
        if beyond is not None:
            raise UsageError(
                f"the prompt's token id {beyond} is not in the vocabulary, 0 to {self._config.vocabulary - 1}"
            )
        return tuple(ids)

    def request(self, ids: tuple[int, ...], wishes: Wishes) -> Request:
        """What the engine is asked for one prompt; UsageError if it cannot be drawn like this."""
        sampling = self.sampling(wishes)
        check_sampling(sampling, self._config.vocabulary, self.valid_vocabulary)
        return Request(
            prompt_ids=ids,
            max_tokens=wishes.max_tokens,
            sampling=sampling,
            stop_ids=frozenset() if wishes.ignore_eos else self.stop_ids,
            on_logits=wishes.on_logits,
            logprobs=wishes.logprobs,
            continued=min(wishes.continued, len(ids)),
        )


def whole_numbers(values: Any) -> list[int]:
    """Token ids as a caller gave them: any sequence of integers, NumPy's included.

    Raises:
        UsageError: It is something else.
    """
    try:
        return [operator.index(value) for value in values]
    except TypeError as error:
        raise UsageError(f"a prompt: expected text or a list of token ids, found {values!r:.80}") from error


def split_prompts(prompt: Any) -> tuple[list[Prompt], bool]:
    """One prompt or several as a list, and whether it was one.

    Raises:
        UsageError: There is none.
    """
    if isinstance(prompt, str):
        return [prompt], True
    try:
        items = list(prompt)
    except TypeError as error:
        raise UsageError(f"prompt: expected text, token ids or a list of those, found {prompt!r:.80}") from error
    if not items:
        raise UsageError("prompt: there is nothing to continue: give text, token ids or a list of those")
    several = all(isinstance(item, str) or hasattr(item, "__len__") for item in items)
    return (items, False) if several else ([items], True)


def known_stop_ids(advised: frozenset[int], tokenizer: Tokenizer | None, vocabulary: int) -> frozenset[int]:
    """The tokens that end a text, as the model's files and its tokenizer say; those that it lacks are said and ignored.

    Args:
        advised: From generation_config.json and config.json.
        tokenizer: Its end token is one, too.
        vocabulary: Rows of the model's embedding table.
    """
    named = advised if tokenizer is None or tokenizer.eos_id is None else advised | {tokenizer.eos_id}
    unknown = sorted(token for token in named if not 0 <= token < vocabulary)
    if unknown:
        logger.warning(
            "eos_token_id %s of the model's files is ignored: its vocabulary is 0 to %d",
            ", ".join(map(str, unknown)),
            vocabulary - 1,
        )
    return named - set(unknown)
