"""One line of the table: what was compared with what, how far it is off, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = tuple[Array, ...]


@dataclass(frozen=True)
class Check:
    """A comparison.

    Attributes:
        level: kernel, expert, moe, attn, layer, model or trace.
        what: What was computed.
        expected: What it was compared with.
        deviation: The largest difference over the largest expected value; against a source, of root mean squares; of
            bits, how many values differ.
        tolerance: The largest deviation that passes; None: the bits must be equal.
    """

    level: str
    what: str
    expected: str
    deviation: float
    tolerance: float | None

    @property
    def passed(self) -> bool:
        """Whether the deviation is allowed; one that is not a number never is."""
        return self.deviation <= (self.tolerance or 0.0)

    @property
    def entries(self) -> dict[str, object]:
        """The line as JSON, in which what is not finite is null."""
        deviation = self.deviation if math.isfinite(self.deviation) else None
        return {
            "level": self.level,
            "what": self.what,
            "expected": self.expected,
            "deviation": deviation,
            "tolerance": "bits" if self.tolerance is None else self.tolerance,
            "passed": self.passed,
        }


def close(level: str, what: str, expected: str, found: Array, wanted: Array, tolerance: float) -> Check:
    """A comparison of numbers of equal shape, relative to the largest one wanted."""
    return Check(level, what, expected, relative_deviation(found, wanted), tolerance)


def same(level: str, what: str, expected: str, found: Sequence[Array], wanted: Sequence[Array]) -> Check:
    """A comparison of bits, array by array."""
    return Check(level, what, expected, float(differing(found, wanted)), None)


def relative_deviation(found: Array, wanted: Array) -> float:
    """The largest difference over the largest value wanted; infinite if shapes differ or anything is not finite."""
    if found.shape != wanted.shape:
        return math.inf
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    if not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        return math.inf
    difference = float(np.abs(found - wanted).max(initial=0.0))
    largest = float(np.abs(wanted).max(initial=0.0))
    return difference / largest if largest else (math.inf if difference else 0.0)


def rms_deviation(found: Array, wanted: Array) -> float:
    """The root mean square of the difference over that of what is wanted; infinite as `relative_deviation`."""
    if found.shape != wanted.shape or not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        return math.inf
    difference, size = float(np.linalg.norm(found - wanted)), float(np.linalg.norm(wanted))
    return difference / size if size else (math.inf if difference else 0.0)


def differing(found: Sequence[Array], wanted: Sequence[Array]) -> int:
    """How many values differ in some bit; all of an array whose shape or type differs."""
    if len(found) != len(wanted):
        return max(1, sum(array.size for array in wanted))
    return sum(_differing(one, other) for one, other in zip(found, wanted, strict=True))


def _differing(found: Array, wanted: Array) -> int:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return max(1, wanted.size)
    bits = np.dtype(f"u{wanted.dtype.itemsize}")
    one, other = (np.ascontiguousarray(array).view(bits) for array in (found, wanted))
    return int(np.count_nonzero(one != other))


def folded(what: str, checks: Sequence[Check]) -> list[Check]:
    """One line for comparisons of bits that all passed; else those that did not."""
    wrong = [check for check in checks if not check.passed]
    return wrong or [Check(checks[0].level, what, checks[0].expected, 0.0, None)]


def describe_settings(settings: Sequence[tuple[str, int]]) -> str:
    """ISA levels with their threads, in a few words."""
    levels = len({isa for isa, threads in settings if threads == 1})
    others = sorted({f"{threads} threads" for _, threads in settings if threads > 1})
    return ", ".join([f"{levels} other ISA level{'' if levels == 1 else 's'}", *others])
