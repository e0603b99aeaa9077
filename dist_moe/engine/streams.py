"""The sequences of one call: from checked requests to pieces and results. On rank 0."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from dist_moe.engine.requests.generation import Drawn, Generation
from dist_moe.engine.requests.pieces import Piece, Result, Usage
from dist_moe.engine.requests.questions import Prompt, TextSide, Wishes, split_prompts
from dist_moe.engine.requests.request import Completion, Request, check_prompt
from dist_moe.engine.requests.writer import Writer
from dist_moe.engine.runtime import Runtime
from dist_moe.engine.start.signals import interrupts_wait
from dist_moe.errors import UsageError
from dist_moe.text.messages import Message, parse_messages
from dist_moe.text.tools import parse_tools

PieceCallback = Callable[[Piece], object]


class Sequences:
    """What one call continues.

    Attributes:
        requests: One per prompt.
        is_one: Whether a prompt was given, and not a list of them.
    """

    def __init__(
        self, text: TextSide, requests: list[Request], writers: list[Writer], wishes: Wishes, is_one: bool = True
    ) -> None:
        """Keep what was checked; see `of_prompts` and `of_messages`."""
        self.requests = requests
        self.is_one = is_one
        self._writers = writers
        self._valid_vocabulary = text.valid_vocabulary
        self._interrupted = wishes.interrupted or (lambda: False)
        self._texts = [""] * len(requests)
        self._last: list[Piece | None] = [None] * len(requests)
        self._generation: Generation | None = None

    @classmethod
    def of_prompts(cls, text: TextSide, prompt: Prompt | Sequence[Prompt], wishes: Wishes) -> Sequences:
        """Sequences that continue prompts.

        Raises:
            UsageError: A prompt or a wish does not fit.
            CheckpointError: Text is asked for, and the model has no tokenizer or a damaged one.
        """
        prompts, is_one = split_prompts(prompt)
        wishes.require_valid(several=len(prompts) > 1)
        requests = [text.request(text.encode(prompt), wishes) for prompt in prompts]
        tokenizer = text.require_tokenizer() if wishes.stop_strings else text.tokenizer
        silent = text.stop_ids
        writers = [
            Writer(index, tokenizer.stream() if tokenizer else None, silent, wishes.stop_strings)
            for index in range(len(requests))
        ]
        return cls(text, requests, writers, wishes, is_one)

    @classmethod
    def of_messages(
        cls,
        text: TextSide,
        messages: Sequence[Message | Mapping[str, Any]],
        thinking: bool | None,
        tools: Sequence[Mapping[str, Any]],
        wishes: Wishes,
    ) -> Sequences:
        """The sequence that answers a conversation.

        Raises:
            UsageError: A message, a tool or a wish does not fit.
            CheckpointError: The model has no chat template.
        """
        wishes.require_valid()
        for name, value in (("messages", messages), ("tools", tools)):
            if not isinstance(value, Sequence):
                raise UsageError(f"{name}: expected a list, found {value!r:.80}")
        turns = [message.to_json() if isinstance(message, Message) else message for message in messages]
        functions = parse_tools(list(tools), "tools") if tools else ()
        prompt = text.chat_format.prompt(parse_messages(turns, "messages"), tools=functions, thinking=thinking)
        stream = text.chat_format.answer(prompt, functions)
        writer = Writer(0, stream, text.stop_ids, wishes.stop_strings)
        return cls(text, [text.request(prompt.ids, wishes)], [writer], wishes)

    def pieces(self, runtime: Runtime) -> Generator[Piece, None, None]:
        """Generate; closing it early ends the generation."""
        generation = self._generation = runtime.start(self.requests, self._valid_vocabulary)
        yield from self._ends(generation)
        with closing(generation.steps()) as steps:
            while (drawn := _next(steps)) is not None:
                for index, token in drawn:
                    yield self._push(generation, index, token)
                if self._interrupted():
                    generation.interrupt()
                yield from self._ends(generation)

    def complete(self, runtime: Runtime, on_piece: PieceCallback | None) -> list[Result]:
        """Generate to the ends; `on_piece` is told each piece."""
        with closing(self.pieces(runtime)) as pieces:
            for piece in pieces:
                if on_piece is not None:
                    on_piece(piece)
        assert self._generation is not None
        return [
            self._result(*each)
            for each in zip(self.requests, self._generation.completions, self._texts, self._last, strict=True)
        ]

    def check(self, runtime: Runtime) -> None:
        """Refuse prompts that are too long.

        Raises:
            UsageError: One is.
        """
        for request in self.requests:
            check_prompt(request.prompt_ids, runtime.context, runtime.config)

    def _push(self, generation: Generation, index: int, token: int) -> Piece:
        writer = self._writers[index]
        piece = writer.push(token)
        if self.requests[index].logprobs is not None:
            piece = replace(piece, logprob=generation.completions[index].logprobs[-1])
        if writer.stop is not None:
            generation.end(index, "stop_string")
        if generation.completions[index].finish_reason is not None:
            piece = self._last[index] = writer.finish(piece, generation.completions[index])
        self._texts[index] += piece.text
        return piece

    def _ends(self, generation: Generation) -> Iterator[Piece]:
        """The last pieces of sequences that have ended without a token."""
        for index, completion in enumerate(generation.completions):
            if completion.finish_reason is not None and self._last[index] is None:
                piece = self._last[index] = self._writers[index].finish(Piece("", index=index), completion)
                self._texts[index] += piece.text
                yield piece

    @staticmethod
    def _result(request: Request, completion: Completion, text: str, last: Piece | None) -> Result:
        assert last is not None
        assert last.finish_reason is not None
        usage = Usage(len(request.prompt_ids), len(completion.ids), completion.reused_tokens)
        return Result(
            text=text,
            ids=tuple(completion.ids),
            finish_reason=last.finish_reason,
            usage=usage,
            stop=last.stop,
            error=last.error,
            logprobs=tuple(completion.logprobs),
        )


def _next(steps: Generator[Drawn, None, None]) -> Drawn | None:
    """One step, which Ctrl-C does not cut in two."""
    with interrupts_wait():
        return next(steps, None)
