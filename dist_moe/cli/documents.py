"""A text file as documents that are read one by one."""

from __future__ import annotations

from pathlib import Path

from dist_moe.cli.config_file import option
from dist_moe.cli.text_files import read_text
from dist_moe.text.tokenizer import Tokenizer

split_option = option(
    "--split",
    metavar="TEXT",
    show_default=False,
    help="Documents end with this text (a special token of the model counts as one, as in <|endoftext|>), and each "
    "is read by itself.",
)


def documents_of(path: Path, separator: str | None, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each document that has any; a separator ends its document and belongs to it.

    Args:
        path: The text.
        separator: None: the text is one document.
        tokenizer: The model's.

    Raises:
        UsageError: The file cannot be read.
    """
    text = read_text(path, "TEXTFILE")
    if separator is None:
        return [ids for ids in [tokenizer.encode(text)] if ids]
    end = tokenizer.encode_trusted(separator)
    parts = text.split(separator)
    last = [] if not parts[-1].strip() else [tokenizer.encode(parts[-1])]
    found = [*(tokenizer.encode(part) + end for part in parts[:-1]), *last]
    return [ids for ids in found if ids]
