"""Limits on what a chat template may compute: its loops and texts may have no end, and it is a stranger's code."""

from __future__ import annotations

import functools
import itertools
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

Value = TypeVar("Value")

# Characters read and made by one rendering; the longest context of Qwen3 (2^20 tokens) has a fiftieth of that.
MAX_WORK = 2**28
STEP_WORK = 256
MAX_SECONDS = 5.0
COUNT, JOIN = "dist_moe_count", "dist_moe_join"
LONG_NUMBER = re.compile(r"\d{6}")


class LimitError(jinja2.TemplateError):
    """A rendering went beyond what a template may compute."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja in its sandbox, with the settings of transformers and with an end.

    Loops, calls, filters, operators and printed values are charged to one account; it is checked before they run.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        """Blocks are trimmed, `{% break %}` and `{% generation %}` are known."""
        self._account = threading.local()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=self._printed,
            extensions=["jinja2.ext.loopcontrols", GenerationBlocks],
        )
        del self.globals["lipsum"]
        self.filters = {name: self._guarded(function) for name, function in self.filters.items()}
        self.filters |= {COUNT: self._counted, JOIN: self._joined}

    @contextmanager
    def limits(self) -> Iterator[None]:
        """Open a new account for what this thread compiles or renders meanwhile."""
        self._account.work, self._account.end = MAX_WORK, time.thread_time() + MAX_SECONDS
        yield

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method of the template's."""
        # The sandbox wraps str.format, so that its own formatter is used.
        receiver = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(receiver, str) and function.__name__.startswith("format"):
            _check_format(receiver)
        self._charge_arguments([receiver, *args, *kwargs.values()])
        return self._made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`."""
        if operator == "**":
            raise LimitError("it computes a power, which no chat template needs")
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        self._charge_arguments([left, right], multiply=operator == "*")
        return self._made(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Instrument().visit(super()._parse(source, name, filename))
        return tree

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._charge_arguments([*args, *kwargs.values()])
            return self._made(function(*args, **kwargs))

        return guarded

    def _counted(self, value: Iterable[Any]) -> _Charged:
        if not isinstance(value, Collection):
            value = list(itertools.islice(value, MAX_WORK // STEP_WORK + 1))
        return _Charged(value, self._charge)

    def _joined(self, values: list[Any]) -> str:
        texts = [str(value) for value in values]
        self._charge(sum(map(len, texts)))
        return "".join(texts)

    def _printed(self, value: Value) -> Value:
        return self._made(value)

    def _made(self, value: Value) -> Value:
        self._charge(_size(value))
        return value

    def _charge_arguments(self, values: list[Any], *, multiply: bool = True) -> None:
        sizes = sorted((_size(value, numbers=True) for value in values), reverse=True)
        # Replacing, indenting and repeating can make a text as long as the product of two arguments.
        product = max(sizes[0], 1) * max(sizes[1], 1) if multiply and len(sizes) > 1 else sum(sizes)
        if product > MAX_WORK:
            raise LimitError("it makes a text of more than 2^28 characters")
        self._charge(STEP_WORK + sum(_size(value) for value in values))

    def _charge(self, work: int) -> None:
        self._account.work -= work
        if self._account.work < 0 or time.thread_time() > self._account.end:
            raise LimitError(f"it computes more than 2^28 characters or {MAX_SECONDS:.0f} s, which no chat needs")


class GenerationBlocks(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's content, in a scope of its own as in transformers."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Charged:
    """Charges each round of a loop."""

    def __init__(self, values: Collection[Any], charge: Callable[[int], None]) -> None:
        self._values, self._charge = values, charge

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self._charge(STEP_WORK)
            yield value


class _Instrument(NodeTransformer):
    """Sends the operations that Jinja compiles to plain Python through filters that charge them."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, COUNT, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        values = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(values, JOIN, [], [], None, None, lineno=node.lineno)


def _size(value: Any, *, numbers: bool = False) -> int:
    if isinstance(value, (str, list, tuple, dict)):
        return len(value)
    return abs(value) if numbers and isinstance(value, int) else 0


def _check_format(text: str) -> None:
    if LONG_NUMBER.search(text):
        raise LimitError(f"it formats with {text[:40]!r}, a width of more than 99999")
