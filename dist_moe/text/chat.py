"""Conversations as tokens: a model's own template, in which nobody's text can forge a token."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_moe.errors import CheckpointError, UsageError
from dist_moe.text.answer import AnswerStream
from dist_moe.text.chat_template import DEFAULT, ChatTemplate, read_chat_templates
from dist_moe.text.disguise import Disguise
from dist_moe.text.markers import THINK_OPEN
from dist_moe.text.messages import Message
from dist_moe.text.reasoning import ThinkingBudget, closing_ids
from dist_moe.text.tokenizer import Tokenizer
from dist_moe.text.tool_calls import find_dialect
from dist_moe.text.tools import Tool

TOOL_TEMPLATE = "tool_use"
# Written by people we do not know, so that not even markup such as <think> counts in them.
OUTSIDERS = ("user", "tool")


class Thinking(enum.Enum):
    """Whether a model thinks before it answers."""

    SWITCHABLE = "switchable"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation that ends where the assistant's next words begin."""

    ids: tuple[int, ...]
    text: str
    thinking_is_open: bool
    tools: tuple[Tool, ...] = ()


class ChatFormat:
    """How one model frames conversations."""

    def __init__(self, tokenizer: Tokenizer, templates: Mapping[str, ChatTemplate]) -> None:
        """Take a model's tokenizer and templates, and find out how it thinks.

        Args:
            tokenizer: The model's.
            templates: By name (`read_chat_templates`), one of them called `default`.

        Raises:
            CheckpointError: There is no template called `default`.
        """
        if DEFAULT not in templates:
            names = f"only {', '.join(sorted(templates))}" if templates else "none"
            raise CheckpointError(f"this model has no chat template called {DEFAULT} ({names}): it cannot chat")
        self.tokenizer = tokenizer
        self._templates = templates
        self.thinking = self._find_thinking()
        self.dialect = find_dialect(self._template(with_tools=True).source)

    @classmethod
    def read(cls, directory: Path, tokenizer: Tokenizer) -> ChatFormat:
        """The format that a model's directory or store describes.

        Raises:
            CheckpointError: It has no chat template, or one that is not valid.
        """
        templates = read_chat_templates(directory)
        if not templates:
            raise CheckpointError(
                f"{directory} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): "
                "it is a base model, or the file is missing; continue plain text with: dist-moe run"
            )
        return cls(tokenizer, templates)

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        thinking: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """The whole conversation, old thinking dropped where the template drops it, and the assistant's turn opened.

        For texts without token names these are exactly the ids of transformers' `apply_chat_template`. Special tokens
        in any message or tool are ordinary characters; in user and tool messages markup tokens (<think>, <tool_call>
        and so on) are, too. A later turn's ids begin with an earlier one's as far as the template repeats it.

        Args:
            messages: Oldest first, at least one.
            tools: The functions that the model may call.
            thinking: On, off, or None for what the template does by itself.
            variables: Further variables of the template.

        Raises:
            UsageError: No message, a role or content that the template refuses, or thinking that cannot be had.
        """
        if not messages:
            raise UsageError("a conversation needs at least one message")
        self._require_thinking(thinking)
        if tools and self.dialect is None:
            raise UsageError("this model's chat template knows no tool calls: leave the tools out")
        switch = {} if thinking is None else {"enable_thinking": thinking}
        return self._render(messages, tools, {**switch, **(variables or {})})

    def answer(self, prompt: ChatPrompt, tools: Sequence[Tool] = ()) -> AnswerStream:
        """What splits the tokens of the answer to `prompt` into thinking, text and calls of its tools, or of others."""
        return AnswerStream(
            self.tokenizer,
            thinking_is_open=prompt.thinking_is_open,
            dialect=self.dialect,
            tools=tuple(tools) or prompt.tools,
        )

    def thinking_budget(self, tokens: int, prompt: ChatPrompt) -> ThinkingBudget:
        """What ends the thinking of the answer to `prompt` after some tokens."""
        return ThinkingBudget(tokens, closing_ids(self.tokenizer), self.answer(prompt))

    def _render(self, messages: Sequence[Message], tools: Sequence[Tool], variables: Mapping[str, Any]) -> ChatPrompt:
        plain = [message.to_json() for message in messages]
        definitions = [dict(tool.definition) for tool in tools]
        disguise = Disguise([plain, definitions])
        frame, every = self.tokenizer.special_tokens, self.tokenizer.added_tokens.keys()
        rendered = self._template(with_tools=bool(tools)).render(
            [disguise.hide(message, every if message["role"] in OUTSIDERS else frame) for message in plain],
            tools=disguise.hide(definitions, frame) or None,
            documents=None,
            add_generation_prompt=True,
            **self.tokenizer.named_tokens,
            **variables,
        )
        pieces = disguise.pieces(rendered)
        return ChatPrompt(
            tuple(self.tokenizer.encode_pieces(pieces)),
            "".join(piece.text for piece in pieces),
            bool(pieces) and not pieces[-1].literal and pieces[-1].text.rstrip().endswith(THINK_OPEN),
            tuple(tools),
        )

    def _template(self, *, with_tools: bool) -> ChatTemplate:
        found = self._templates.get(TOOL_TEMPLATE) if with_tools else None
        return found or self._templates[DEFAULT]

    def _find_thinking(self) -> Thinking:
        probe = [Message("user", "x")]
        try:
            on, off = (self._render(probe, (), {"enable_thinking": value}) for value in (True, False))
        except UsageError:
            return Thinking.NEVER  # a template that refuses a single question will say why when it is asked
        if on.text != off.text:
            return Thinking.SWITCHABLE
        return Thinking.ALWAYS if on.thinking_is_open else Thinking.NEVER

    def _require_thinking(self, thinking: bool | None) -> None:
        if thinking is False and self.thinking is Thinking.ALWAYS:
            raise UsageError("this model always thinks: its chat template has no enable_thinking; leave thinking on")
        if thinking is True and self.thinking is Thinking.NEVER:
            raise UsageError("this model does not think: its chat template has no enable_thinking; leave thinking off")
