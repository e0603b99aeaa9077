"""Calls that all ranks make in the same order: rank 0 does the work and says how each one went, the others follow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from dist_moe import errors
from dist_moe.engine.runtime import Runtime
from dist_moe.engine.start.signals import interrupts_ignored
from dist_moe.errors import DistMoeError, UsageError
from dist_moe.parallel.world import AgreedError

Made = TypeVar("Made")
_INTERRUPT = "KeyboardInterrupt"
_SAME_CALLS = "all ranks make the same calls in the same order; what is rank 0's alone belongs into engine.lead()"
_Key = tuple[int, str]  # the number of a call, and its name with the stage that it has come to


class Calls:
    """Numbers the calls of one engine, so that the ranks know which one a word of rank 0 is about.

    While rank 0 is inside a call, further ones are its own: the others, which are inside the same call, do what these
    need without making them.
    """

    def __init__(self, runtime: Runtime, ranks: int) -> None:
        """Begin with no call made.

        Args:
            runtime: Carries the words.
            ranks: How many ranks there are.
        """
        self._runtime = runtime
        self._alone = ranks == 1
        self._leads = runtime.is_leader
        self._count = 0
        self._inside = 0
        self._heard: dict[_Key, dict[str, Any]] = {}
        self.over = False

    def number(self) -> int:
        """The number of a call that this rank begins; 0 for rank 0's own calls inside another one."""
        if self._inside:
            return 0
        self._count += 1
        return self._count

    # ---- rank 0 ----

    @contextmanager
    def lead(self, number: int, stage: str) -> Iterator[dict[str, Any]]:
        """Tell the other ranks how the block ended: with an error, or well.

        The block may put a `value` into the dictionary that it gets, which the others are told.
        """
        said: dict[str, Any] = {}
        self._inside += 1
        try:
            yield said
        except AgreedError:
            raise  # the others have left with it
        except GeneratorExit:  # a caller wants no more pieces
            self._say(number, stage, said)
            raise
        except BaseException as error:
            self._say(number, stage, {"error": _describe(error)})
            if isinstance(error, DistMoeError) and not self._runtime.busy:
                error.agreed = True
            raise
        finally:
            self._inside -= 1
        self._say(number, stage, said)

    def _say(self, number: int, stage: str, said: dict[str, Any]) -> None:
        # An error inside a step leaves the others in it: nothing can be said, only the job be ended.
        if number and not self._alone and not self._runtime.busy:
            self._runtime.say(json.dumps([number, stage, said]))

    # ---- the other ranks ----

    def follow(self, number: int, stage: str) -> Any:
        """Do what rank 0 orders until it says how this call went.

        Returns:
            The value that it says, or None.

        Raises:
            UsageError: It has closed the engine without making this call.
            DistMoeError: The error that it met.
            AgreedError: Ranks differ, or a weight is damaged.
        """
        key = (number, stage)
        with interrupts_ignored():
            while key not in self._heard and not self.over:
                self._require_same(number, stage)
                text = self._runtime.follow()
                if text is None:
                    self.over = True
                else:
                    heard_number, heard_stage, said = json.loads(text)
                    self._heard[heard_number, heard_stage] = said
        if key not in self._heard:
            raise UsageError(f"rank 0 has closed the engine without this {_name(stage)}(): {_SAME_CALLS}")
        said = self._heard.pop(key)
        if "error" in said:
            raise _rebuild(said["error"])
        return said.get("value")

    def _require_same(self, number: int, stage: str) -> None:
        others = [heard for of, heard in self._heard if of == number and _name(heard) != _name(stage)]
        if others:
            raise UsageError(f"rank 0 calls {_name(others[0])}() where this rank calls {_name(stage)}(): {_SAME_CALLS}")

    def follow_end(self) -> None:
        """Do what rank 0 orders until it closes the engine."""
        with interrupts_ignored():
            while not self.over:
                self.over = self._runtime.follow() is None

    # ---- all ranks ----

    def together(
        self, name: str, work: Callable[[], Made], encode: Callable[[Made], Any], decode: Callable[[Any], Made]
    ) -> Made:
        """Let rank 0 do something and give all ranks what it made.

        Args:
            name: The call's.
            work: Done on rank 0.
            encode: What it made as JSON.
            decode: The inverse.
        """
        number = self.number()
        if not self._leads:
            return decode(self.follow(number, name))
        with self.lead(number, name) as said:
            made = work()
            if not self._alone:
                said["value"] = encode(made)
        return made


def _name(stage: str) -> str:
    """The call's name, of "generate begins"."""
    return stage.split()[0]


def _describe(error: BaseException) -> list[Any]:
    if isinstance(error, DistMoeError):
        return [type(error).__name__, str(error), error.exit_code]
    if isinstance(error, KeyboardInterrupt):
        return [_INTERRUPT, "", 0]
    return [DistMoeError.__name__, f"rank 0 met {type(error).__name__}: {error}", 1]


def _rebuild(described: list[Any]) -> BaseException:
    name, text, exit_code = described
    if name == _INTERRUPT:
        return KeyboardInterrupt()
    kind = getattr(errors, name, DistMoeError)
    error: DistMoeError = kind(text)
    error.exit_code = exit_code
    error.agreed = True
    return error
