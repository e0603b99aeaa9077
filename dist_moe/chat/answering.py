"""From a conversation to an answer, on rank 0: the model's chat format around the engine's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from dist_moe.chat.protocol import Done, Generate, Note, Piece, Refused
from dist_moe.engine.engine import Engine
from dist_moe.engine.requests.request import SamplingOptions
from dist_moe.errors import UsageError
from dist_moe.text.answer import AnswerStream, Delta
from dist_moe.text.chat import ChatFormat, ChatPrompt, Thinking
from dist_moe.text.messages import parse_messages
from dist_moe.text.reasoning import ThinkingBudget
from dist_moe.text.tools import Tool, parse_tools

Show = Callable[[Piece | Note], None]
Asked = Callable[[], bool]


@dataclass(frozen=True)
class Answerer:
    """How this chat's answers are made.

    Attributes:
        format: The model's.
        sampling: How tokens are drawn; each request brings its own seed.
        context: Positions of the conversation and its answer together.
        max_tokens: Of one answer at most; None: as many as the context takes.
    """

    format: ChatFormat
    sampling: SamplingOptions
    context: int
    max_tokens: int | None

    def answer(self, engine: Engine, request: Generate, show: Show, interrupted: Asked) -> Done | Refused:
        """Generate one answer.

        Args:
            engine: On rank 0, which leads.
            request: The conversation.
            show: Told what the tokens add.
            interrupted: Asked after each step whether to end.

        Raises:
            DistMoeError: The job cannot go on.
        """
        try:
            tools = parse_tools(request.tools, "tools") if request.tools else ()
            prompt = self.prompt(request, tools)
            budget = self._budget(request.thinking, prompt)
        except UsageError as error:
            return Refused(str(error))
        writer = _Writer(self.format.answer(prompt, tools), budget, show)
        before = engine.statistics()
        reason, fault = self._generate(engine, request.seed, prompt, writer, interrupted)
        writer.finish()
        after = engine.statistics()
        computed = after.prefill_tokens - before.prefill_tokens - writer.prefilled_tokens
        return Done(
            message=writer.stream.message.to_json(),
            finish_reason=reason,
            error=fault,
            prompt_tokens=len(prompt.ids),
            reused_tokens=max(0, len(prompt.ids) - computed),
            completion_tokens=len(writer.ids),
            prefill_s=after.prefill_s - before.prefill_s,
            decode_s=after.decode_s - before.decode_s,
        )

    def prompt(self, request: Generate, tools: Sequence[Tool] = ()) -> ChatPrompt:
        """The conversation's tokens.

        Raises:
            UsageError: The template refuses it, or it does not leave room for an answer.
        """
        messages = parse_messages(request.messages, "conversation")
        prompt = self.format.prompt(messages, tools=tools, thinking=self._switch(request.thinking))
        if len(prompt.ids) >= self.context:
            raise UsageError(
                f"the conversation has {len(prompt.ids)} tokens, the context {self.context} positions, so no answer "
                "fits: /undo or /clear, send a shorter message, or start with a larger --ctx"
            )
        return prompt

    def _switch(self, thinking: str) -> bool | None:
        """What the template is told; a budget of 0 is off where that is possible."""
        words = {"auto": None, "on": True, "off": False}
        if thinking in words:
            return words[thinking]
        return not (int(thinking) == 0 and self.format.thinking is Thinking.SWITCHABLE)

    def _budget(self, thinking: str, prompt: ChatPrompt) -> ThinkingBudget | None:
        return self.format.thinking_budget(int(thinking), prompt) if thinking.isdecimal() else None

    def _generate(
        self, engine: Engine, seed: int, prompt: ChatPrompt, writer: _Writer, interrupted: Asked
    ) -> tuple[str, str]:
        """Generate; where thinking is cut short, go on behind the tokens that end it.

        Returns:
            The finish reason, and what went wrong in the model or "".
        """
        room = self.context - len(prompt.ids)
        most = room if self.max_tokens is None else min(room, self.max_tokens)
        while True:
            fresh = writer.take_forced(most)
            if len(writer.ids) == most:
                return _name_end("length", most, room), ""
            writer.prefilled_tokens += fresh
            pieces = engine.generate(
                [*prompt.ids, *writer.ids],
                max_tokens=most - len(writer.ids),
                sampling=replace(self.sampling, seed=seed),
                continued=len(writer.ids),
                interrupted=interrupted,
            )
            with closing(pieces):
                for piece in pieces:
                    writer.take(piece.ids)
                    if piece.finish_reason is not None:
                        return _name_end(piece.finish_reason, most, room), piece.error or ""
                    if writer.is_forced:
                        break
            if interrupted():
                return "interrupted", ""


def _name_end(reason: str, most: int, room: int) -> str:
    """The finish reason; an answer that may be as long as there is room is ended by the context."""
    return "context" if reason == "length" and most == room else reason


class _Writer:
    """Takes one answer's tokens and shows what they add."""

    def __init__(self, stream: AnswerStream, budget: ThinkingBudget | None, show: Show) -> None:
        self.stream = stream
        self.ids: list[int] = []
        self._budget, self._show = budget, show
        self._forced = budget.start() if budget else ()
        self.prefilled_tokens = 0  # of the answer, which a prefill computed

    @property
    def is_forced(self) -> bool:
        """Whether certain tokens must come next."""
        return bool(self._forced)

    def take(self, tokens: Sequence[int]) -> None:
        """Take tokens that the model chose."""
        for token in tokens:
            self._push(token)
            if self._budget is not None:
                self._forced = self._budget.push(token)

    def take_forced(self, most: int) -> int:
        """Take the tokens that must come next, as many as there is room for.

        Returns:
            How many of the answer are not computed now: these, and the last one that was drawn before them.
        """
        forced, self._forced = self._forced[: most - len(self.ids)], ()
        fresh = len(forced) + bool(forced and self.ids)
        for token in forced:
            self._push(token)
        return fresh

    def finish(self) -> None:
        """Show what was held back."""
        self._emit(self.stream.finish())

    def _push(self, token: int) -> None:
        self.ids.append(token)
        self._emit(self.stream.push(token))

    def _emit(self, found: Delta) -> None:
        if found.reasoning:
            self._show(Piece(found.reasoning, "reasoning"))
        if found.content:
            self._show(Piece(found.content, "answer"))
        for note in found.notes:
            self._show(Note(note))
