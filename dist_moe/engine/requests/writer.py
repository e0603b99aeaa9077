"""One sequence's tokens become pieces: whole characters, without what ends the text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from dist_moe.engine.requests.pieces import Piece
from dist_moe.engine.requests.request import Completion
from dist_moe.text.answer import AnswerStream, Delta
from dist_moe.text.stop_strings import StopStrings
from dist_moe.text.stream import TextStream


class Writer:
    """Follows one sequence.

    Attributes:
        stop: The stop string that the text met, or None.
    """

    def __init__(
        self, index: int, stream: TextStream | AnswerStream | None, silent_ids: Collection[int], stop: Sequence[str]
    ) -> None:
        """Begin an empty text.

        Args:
            index: Which of the prompts it continues.
            stream: Turns tokens into text, or into thinking, text and calls; None for a model without a tokenizer.
            silent_ids: Tokens that end a text without being part of it.
            stop: Strings before which it ends.
        """
        self._index = index
        self._stream = stream
        self._silent_ids = silent_ids
        self._stops = StopStrings(stop)
        self._closed = stream is None

    @property
    def stop(self) -> str | None:
        """The stop string that the text met, or None."""
        return self._stops.found

    def push(self, token: int) -> Piece:
        """What a token adds."""
        found = Delta()
        if self._stream is not None and token not in self._silent_ids:
            found = _delta(self._stream.push(token))
        return self._piece(self._stops.push(found.content), found, (token,))

    def finish(self, last: Piece, completion: Completion) -> Piece:
        """The last piece: what was held back, and why the sequence ended."""
        if self._stream is not None and self.stop is None:
            rest = _delta(self._stream.finish())
            text = self._stops.push(rest.content)
            piece = self._piece(text if self.stop else text + self._stops.finish(), rest, ())
            last = replace(
                last,
                text=last.text + piece.text,
                reasoning=last.reasoning + piece.reasoning,
                tool_calls=last.tool_calls + piece.tool_calls,
                notes=last.notes + piece.notes,
            )
        reason = "stop_string" if self.stop else completion.finish_reason
        return replace(last, finish_reason=reason, stop=self.stop, error=completion.error)

    def _piece(self, text: str, found: Delta, ids: tuple[int, ...]) -> Piece:
        return Piece(text, ids, self._index, reasoning=found.reasoning, tool_calls=found.calls, notes=found.notes)


def _delta(found: str | Delta) -> Delta:
    return Delta(content=found) if isinstance(found, str) else found
