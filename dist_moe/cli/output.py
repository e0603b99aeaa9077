"""What a run prints: text as it is made, token ids if there is no tokenizer, or one JSON object at the end."""

from __future__ import annotations

import json
from typing import Any

import click

from dist_moe.cli.options import RunOptions
from dist_moe.cli.prompt import Prompt
from dist_moe.cli.summary import as_json, ending, summary_lines
from dist_moe.cli.token_lines import token_line
from dist_moe.engine.requests.pieces import Piece, Result
from dist_moe.engine.watch.statistics import EngineStatistics
from dist_moe.errors import UsageError
from dist_moe.text.tokenizer import Tokenizer


class Output:
    """The printed side of one run. Text goes to stdout, the summary to stderr."""

    def __init__(self, options: RunOptions, tokenizer: Tokenizer | None) -> None:
        """Prepare an empty text.

        Args:
            options: `json` and `quiet` decide what is printed.
            tokenizer: None prints ids instead of text.
        """
        self._options = options
        self._tokenizer = tokenizer
        self._pieces: list[str] = []
        self._tokens = 0

    def begin(self, prompt: Prompt) -> None:
        """Print the text that is continued, or its tokens one by one."""
        if self._options.show_tokens and not self._options.json:
            for token in () if self._options.quiet else prompt.ids:
                _print(token_line(self._tokenizer, token) + "\n")
        elif not (self._options.json or self._options.quiet):
            _print(prompt.text)

    def piece(self, piece: Piece) -> None:
        """Print what a step adds."""
        for token in piece.ids:
            if self._options.show_tokens and not self._options.json:
                _print(token_line(self._tokenizer, token) + "\n")
            if self._tokenizer is None:
                self._emit(f",{token}" if self._tokens else str(token))
            self._tokens += 1
        self._emit(piece.text)

    def end(
        self, prompt: Prompt, result: Result, statistics: EngineStatistics, ranks: dict[str, Any] | None = None
    ) -> None:
        """Print the end of the text, and the summary; `ranks` goes into the JSON alone."""
        text = "".join(self._pieces)
        if self._options.show_tokens and not self._options.json:
            _print("\n" + ("" if self._options.quiet else prompt.text) + text)
        if self._options.json:
            found = as_json(result, text if self._tokenizer else None, statistics)
            if ranks is not None:
                found["stats"] = ranks
            if self._options.show_tokens:
                found["tokens"] = [token_line(self._tokenizer, token) for token in (*prompt.ids, *result.ids)]
            _print(json.dumps(found, ensure_ascii=False) + "\n")
            return
        if not text.endswith("\n"):
            _print("\n")
        if not self._options.quiet:
            for line in (*summary_lines(statistics), ending(result)):
                click.echo(line, err=True)

    def _emit(self, piece: str) -> None:
        self._pieces.append(piece)
        if piece and not (self._options.json or self._options.show_tokens):
            _print(piece)


def _print(text: str) -> None:
    """Write to stdout and flush.

    Raises:
        UsageError: It cannot be written, for example to a full disk.
    """
    try:
        click.echo(text, nl=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"standard output cannot be written ({error.strerror}): send it elsewhere") from error
