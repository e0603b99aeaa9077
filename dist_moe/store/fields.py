"""Strict reading of JSON objects: every key is asked for, checked and ticked off; what is left over is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dist_moe.errors import StoreError


class Fields:
    """One JSON object. `where` names it in errors, which are StoreErrors that end with what to do."""

    def __init__(self, value: Any, where: str, advice: str) -> None:
        """Take a parsed JSON value; raises StoreError if it is not an object."""
        self._where = where
        self._advice = advice
        if not isinstance(value, dict):
            raise self._error("is not a JSON object")
        self._values: dict[str, Any] = dict(value)

    def take(self, key: str) -> Any:
        """The value of a key that must be there."""
        if key not in self._values:
            raise self._error(f"has no {key!r}")
        return self._values.pop(key)

    def __contains__(self, key: str) -> bool:
        """Whether a key is there that need not be."""
        return key in self._values

    def integer(self, key: str, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        value = self.take(key)
        if type(value) is not int or not low <= value <= high:
            raise self._error(f"{key!r} must be a whole number from {low} to {high}, not {_short(value)}")
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.take(key)
        if type(value) is not bool:
            raise self._error(f"{key!r} must be true or false, not {_short(value)}")
        return value

    def text(self, key: str, pattern: str = r"[^\x00-\x1f]{0,4096}") -> str:
        """A string that matches the whole pattern."""
        value = self.take(key)
        if type(value) is not str or not re.fullmatch(pattern, value):
            raise self._error(f"{key!r} must be a string of the form {pattern}, not {_short(value)}")
        return value

    def choice(self, key: str, choices: Sequence[str]) -> str:
        """One of the given strings."""
        value = self.take(key)
        if value not in choices or type(value) is not str:
            raise self._error(f"{key!r} must be one of {', '.join(choices)}, not {_short(value)}")
        return value

    def objects(self, key: str) -> list[Fields]:
        """A list of objects."""
        items = enumerate(self._list(key))
        return [Fields(item, f"{self._where}: {key}[{i}]", self._advice) for i, item in items]

    def object(self, key: str) -> Fields:
        """A nested object."""
        return Fields(self.take(key), f"{self._where}: {key}", self._advice)

    def integers(self, key: str, low: int, high: int) -> list[int]:
        """A list of whole numbers in [low, high]."""
        values = self._list(key)
        if any(type(value) is not int or not low <= value <= high for value in values):
            raise self._error(f"{key!r} must hold whole numbers from {low} to {high}")
        return values

    def runs(self, key: str, stop: int) -> tuple[tuple[int, int], ...]:
        """Ascending half-open ranges [first, stop) inside [0, stop) that neither overlap nor touch."""
        runs = []
        previous = -1
        for run in self._list(key):
            if type(run) is not list or len(run) != 2 or any(type(end) is not int for end in run):
                raise self._error(f"{key!r} must hold pairs [first, stop], not {_short(run)}")
            if not previous < run[0] < run[1] <= stop:
                raise self._error(f"{key!r} must hold ascending ranges within 0..{stop}, not {_short(run)}")
            previous = run[1]
            runs.append((run[0], run[1]))
        return tuple(runs)

    def counts(self, key: str) -> dict[str, int]:
        """An object of names and positive counts."""
        fields = self.object(key)
        names = list(fields._values)
        return {name: fields.integer(name, 1, 2**63 - 1) for name in names}

    def done(self) -> None:
        """Refuse keys that nobody asked for."""
        if self._values:
            raise self._error(f"has unknown keys: {', '.join(sorted(self._values))[:200]}")

    def require(self, holds: bool, problem: str) -> None:
        """Refuse the object unless a condition on its values holds."""
        if not holds:
            raise self._error(problem)

    def _list(self, key: str) -> list[Any]:
        value = self.take(key)
        if type(value) is not list:
            raise self._error(f"{key!r} must be a list, not {_short(value)}")
        return value

    def _error(self, problem: str) -> StoreError:
        return StoreError(f"{self._where}: {problem}; {self._advice}")


def _short(value: Any) -> str:
    return repr(value)[:80]
