"""Lines that begin with a slash: what they are called, and what they take."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from dist_moe.errors import UsageError

THINKING_WORDS = ("auto", "on", "off")
LARGEST_BUDGET = 1 << 20


@dataclass(frozen=True)
class Command:
    """A command's name, its argument ("" none, "[X]" may be left out), and its help."""

    name: str
    argument: str
    help: str


COMMANDS = (
    Command("help", "", "this list"),
    Command("retry", "", "answer the last message once more, with the next seed"),
    Command("undo", "", "take back the last message and its answer"),
    Command("clear", "", "forget the conversation, keep the system prompt"),
    Command("save", "FILE", "write the conversation to a file"),
    Command("load", "FILE", "go on with a saved conversation"),
    Command("system", "[TEXT]", "set the system prompt; without TEXT show it; - removes it"),
    Command("think", "[TEXT]", "let the model think from now on; TEXT is the next message"),
    Command("no_think", "[TEXT]", "do not let it think from now on"),
    Command("thinking", "[auto|on|off|TOKENS|show|hide]", "the same, or at most TOKENS of thinking; show or hide it"),
    Command("tools", "[FILE|off]", "functions that the model may call; without an argument list them"),
    Command("stats", "", "tokens and speed of the last answer"),
    Command("exit", "", "leave (so does Ctrl-D)"),
)
_ALIASES = {"quit": "exit", "bye": "exit", "regen": "retry", "?": "help"}


@dataclass(frozen=True)
class Call:
    """A command and the argument that was given, without blanks around it."""

    name: str
    argument: str


def parse_line(text: str) -> Call | str:
    """A line of the user: a command, or the message that it is.

    `//` begins a message with a slash; a line with more than one slash in its first word (a path) is a message.

    Raises:
        UsageError: No such command, or its argument is missing or too much.
    """
    if not text.startswith("/"):
        return text
    if text.startswith("//"):
        return text[1:]
    word, argument = [*text[1:].split(None, 1), "", ""][:2]
    if "/" in word:
        return text
    name = _ALIASES.get(word, word)
    command = next((command for command in COMMANDS if command.name == name), None)
    if command is None:
        raise UsageError(f"unknown command /{word}{_nearest(word)}: /help lists all; // begins a message with a slash")
    argument = argument.strip()
    if argument and not command.argument:
        raise UsageError(f"/{name} takes nothing, found {argument[:40]!r}")
    if not argument and command.argument and not command.argument.startswith("["):
        raise UsageError(f"/{name} needs {command.argument}: /{name} {command.argument}")
    return Call(name, argument)


def parse_thinking(text: str, where: str) -> str:
    """auto, on, off, or a number of tokens, as the protocol carries it.

    Raises:
        UsageError: It is none of them.
    """
    if text in THINKING_WORDS:
        return text
    if text.isascii() and text.isdecimal() and int(text) <= LARGEST_BUDGET:
        return str(int(text))
    raise UsageError(
        f"{where}: expected auto, on, off or a number of tokens from 0 to {LARGEST_BUDGET}, found {text[:40]!r}"
    )


def help_lines() -> list[str]:
    """All commands, and the keys."""
    width = max(len(f"/{command.name} {command.argument}") for command in COMMANDS if len(command.argument) < 12)
    lines = [f"{f'/{command.name} {command.argument}'.rstrip():<{width}}  {command.help}" for command in COMMANDS]
    return [
        *lines,
        "Enter sends; Alt-Enter or \\ at the end of a line begins another; Ctrl-C stops an answer, Ctrl-D leaves.",
    ]


def _nearest(word: str) -> str:
    names = [command.name for command in COMMANDS] + list(_ALIASES)
    (nearest,) = difflib.get_close_matches(word, names, 1, 0.6) or [""]
    return f" (did you mean /{nearest}?)" if nearest else ""
