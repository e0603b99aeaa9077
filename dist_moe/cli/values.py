"""The types of options: each refuses a value in one sentence that names the option as the user wrote it."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NoReturn

import click
import click.shell_completion
from click.core import ParameterSource

if TYPE_CHECKING:
    TextChoice = click.Choice[str]
else:
    TextChoice = click.Choice  # generic since click 8.2

_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}

# In a context's `meta`: how the config file spells each option that stands in it.
CONFIG_KEYS = "dist_moe.config_keys"


class BadValue(click.BadParameter):
    """A value that an option does not take: `--max-tokens: expected a whole number from 1, found 'abc'`."""

    def format_message(self) -> str:
        """The sentence, without a full stop."""
        return f"{_spelling(self.ctx, self.param)}: {self.message}"


class Whole(click.IntRange):
    """A whole number in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse and check."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            refuse(f"a whole number {_range(self.min, self.max)}", value, param, ctx)


class Number(click.FloatRange):
    """A number in a range; click's own FloatRange lets NaN through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse and check."""
        try:
            number = super().convert(value, param, ctx)
        except click.BadParameter:
            number = math.nan
        if math.isnan(number):
            refuse(f"a number {_range(self.min, self.max)}", value, param, ctx)
        return number


class WholeList(click.types.StringParamType):
    """Whole numbers in a range, separated by commas; the value stays a text, see `numbers`."""

    def __init__(self, least: int, most: int) -> None:
        """Both ends are allowed."""
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check."""
        text = super().convert(value, param, ctx)
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isdecimal() and part.isascii() and self._least <= int(part) <= self._most for part in parts):
            refuse(f"whole numbers {_range(self._least, self._most)} with commas between them", value, param, ctx)
        return ",".join(str(int(part)) for part in parts)


class WholeRange(click.types.StringParamType):
    """A whole number, or two with a - between them, in a range; the value stays a text, see `ends`."""

    def __init__(self, least: int, most: int) -> None:
        """Both ends are allowed."""
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check."""
        text = super().convert(value, param, ctx)
        parts = [part.strip() for part in text.split("-")]
        if not all(part.isdecimal() and part.isascii() for part in parts) or len(parts) > 2:
            refuse(f"a whole number {_range(self._least, self._most)}, or two like 1-8", value, param, ctx)
        first, last = int(parts[0]), int(parts[-1])
        if not self._least <= first <= last <= self._most:
            refuse(f"a whole number {_range(self._least, self._most)}, or two like 1-8", value, param, ctx)
        return f"{first}-{last}"


def ends(text: str) -> tuple[int, int]:
    """The first and the last number of a `WholeRange`."""
    first, _, last = text.partition("-")
    return int(first), int(last or first)


class SomeText(click.types.StringParamType):
    """A text of at least one character, see `unescape`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check."""
        text = super().convert(value, param, ctx)
        if not text:
            refuse("a text of at least one character", value, param, ctx)
        return text


class TextPattern(click.types.StringParamType):
    """A text of a certain form."""

    def __init__(self, pattern: str, expected: str) -> None:
        """`pattern` matches it whole; `expected` says what it is."""
        self._pattern, self._expected = re.compile(pattern), expected

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check."""
        text = super().convert(value, param, ctx)
        if not self._pattern.fullmatch(text):
            refuse(self._expected, value, param, ctx)
        return text


def unescape(text: str) -> str:
    r"""A text in which \n, \r, \t and \\ stand for the characters that a shell makes hard to write."""
    return re.sub(r"\\([nrt\\])", lambda found: _ESCAPES[found[1]], text)


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of a `WholeList`, each once, in their order."""
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


class OneOf(TextChoice):
    """One of a few words."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            refuse(f"{', '.join(self.choices[:-1])} or {self.choices[-1]}", value, param, ctx)


class YesNo(click.types.BoolParamType):
    """The value of a flag where it comes from a file or the environment."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            refuse("true or false", value, param, ctx)


class PathName(click.types.StringParamType):
    """The name of a file or directory; empty ones, which an unset shell variable gives, name the working directory."""

    def __init__(self, expected: str = "the name of a file or directory") -> None:
        """`expected` says what the option takes."""
        self._expected = expected

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check."""
        name = super().convert(value, param, ctx)
        if not name:
            self.fail(f"expected {self._expected}, found an empty text (an unset variable?)", param, ctx)
        if "\0" in name:
            refuse(self._expected, name, param, ctx)
        return name

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        """Let the shell complete names of files."""
        return [click.shell_completion.CompletionItem(incomplete, type="file")]

    def fail(self, message: str, param: click.Parameter | None = None, ctx: click.Context | None = None) -> NoReturn:
        """Raise."""
        raise BadValue(message, ctx, param)


def refuse(expected: str, found: Any, param: click.Parameter | None, ctx: click.Context | None) -> NoReturn:
    """Raise BadValue with what was expected and the value that was found, cut to a readable length."""
    text = str(found)
    text = text if len(text) <= 40 else text[:37] + "..."
    raise BadValue(f"expected {expected}, found {text!r}", ctx, param)


def _range(least: float | None, most: float | None) -> str:
    return f"from {least or 0:g}" if most is None else f"from {least or 0:g} to {_digits(most)}"


def _digits(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _spelling(context: click.Context | None, parameter: click.Parameter | None) -> str:
    if parameter is None:
        return "value"
    name = str(parameter.name)
    if context is not None and context.get_parameter_source(name) is ParameterSource.DEFAULT_MAP:
        return str(context.meta.get(CONFIG_KEYS, {}).get(name, name))
    if isinstance(parameter, click.Argument):
        shown = parameter.human_readable_name
        return shown[1:-1] if shown.startswith("[") and shown.endswith("]") else shown
    return max(parameter.opts, key=len)
