"""JSON files with checked access: a value is what it should be, or one sentence says what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_moe.errors import CheckpointError

# Sizes and positions go through int32 in the kernels.
LARGEST_SIZE = 2**31 - 1
LARGEST_NUMBER = 1e30
# What takes memory or time by its mere number, before any tensor has been seen.
MOST_LAYERS, MOST_EXPERTS, LARGEST_HEAD_DIM = 100_000, 1 << 20, 1 << 20
ADVICE = "check that the file is the one that was published with these weights"


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file.

    Raises:
        CheckpointError: If the file is missing, unreadable, no JSON or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {ADVICE}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, but it does not parse ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {shown(value)}; {ADVICE}")
    return value


def shown(value: object) -> str:
    """A JSON value for a message, cut to a readable length."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class Fields:
    """A JSON object and the place it came from; null counts as absent.

    Every method raises CheckpointError if the value is absent without a default, or not of the kind asked for.
    """

    where: str
    values: Mapping[str, object]

    def refusal(self, key: str, expected: str, action: str = ADVICE) -> CheckpointError:
        """The error for one key: what it is, what was expected, and what to do."""
        actual = f"is {shown(self.values[key])}" if key in self.values else "is missing"
        return CheckpointError(f"{self.where}: {key} {actual}, expected {expected}; {action}")

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, minimum: int = 1, default: int | None = None) -> int:
        """A whole number of at least `minimum`."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= LARGEST_SIZE:
            raise self.refusal(key, f"a whole number from {minimum} to {LARGEST_SIZE}")
        return value

    def count(self, key: str, most: int, minimum: int = 1) -> int:
        """A whole number from `minimum` to `most`, of things that are listed one by one."""
        value = self.integer(key, minimum)
        if value > most:
            raise self.refusal(key, f"at most {most}")
        return value

    def number(self, key: str, above: float = 0.0) -> float:
        """A finite number greater than `above`."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < LARGEST_NUMBER:
            raise self.refusal(key, f"a number above {above:g}")
        return float(value)

    def optional_number(self, key: str, above: float = 0.0) -> float | None:
        """A finite number greater than `above`, or None if absent."""
        return self.number(key, above) if self.has(key) else None

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refusal(key, "true or false")
        return value

    def indices(self, key: str, count: int) -> tuple[int, ...]:
        """A list of whole numbers from 0 to count - 1, empty if absent."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or any(type(item) is not int or not 0 <= item < count for item in value):
            raise self.refusal(key, f"a list of whole numbers from 0 to {count - 1}")
        return tuple(value)
