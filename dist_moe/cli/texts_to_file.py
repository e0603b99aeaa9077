"""What `calibrate` and `profile` share: texts that are read whole, and the file that gets what was found in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from dist_moe import files
from dist_moe.cli.config_file import option
from dist_moe.cli.documents import documents_of
from dist_moe.cli.values import PathName
from dist_moe.engine.text_windows import pieces_of
from dist_moe.errors import UsageError
from dist_moe.text.tokenizer import Tokenizer

Command = TypeVar("Command", bound=Callable[..., Any])


def texts_to_file(metavar: str, what: str) -> Callable[[Command], Command]:
    """Decorate a command with TEXTFILE... and -o.

    Args:
        metavar: Of -o.
        what: What goes into the file, as the help begins.
    """
    texts = click.argument("texts", metavar="TEXTFILE...", nargs=-1, required=True, type=PathName("the name of a file"))
    output = option(
        "-o",
        "--output",
        type=PathName(),
        metavar=metavar,
        required=True,
        show_default=False,
        help=f"{what}; written under another name until they are whole.",
    )
    return lambda command: texts(output(command))


def require_output(output: Path, inputs: Sequence[str], kind: str, *, replace: bool) -> None:
    """Find out before a long run whether a file can be written and nothing is lost by it.

    Args:
        output: What -o names.
        inputs: The files that are read.
        kind: What those are: "text" or "calibration".
        replace: Whether another file may stand there.

    Raises:
        UsageError: It is one of the inputs, is there already, or cannot be written.
    """
    for name in inputs:
        if files.is_same(Path(name), output):
            raise UsageError(f"-o {output}: that is the {kind} {name}, which would be lost: name another file")
    if files.exists(output) and not replace:
        raise UsageError(f"-o {output}: is there already: name another file, or replace it with --force")
    files.require_writable(output)


def pieces_of_texts(names: Sequence[str], separator: str | None, tokenizer: Tokenizer, window: int) -> list[list[int]]:
    """The tokens of all texts, in pieces of at most `window`.

    Args:
        names: Of the files.
        separator: Ends a document, which is read by itself; None: each text is one.
        tokenizer: The model's.
        window: Positions.

    Raises:
        UsageError: A file cannot be read, or holds no token.
    """
    pieces: list[list[int]] = []
    for name in names:
        documents = documents_of(Path(name), separator, tokenizer)
        if not documents:
            raise UsageError(f"{name}: holds no text: give a file of what the model will read")
        pieces += [piece for ids in documents for piece in pieces_of(ids, window)]
    return pieces
