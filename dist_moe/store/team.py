"""The ranks that write one store together: rank 0 leads, and deals out whole files in turns."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from dist_moe import files
from dist_moe.errors import DistMoeError, PlaceError
from dist_moe.store.lock import LOCK_NAME
from dist_moe.store.manifest import Manifest, StoreFile, parse_manifest
from dist_moe.store.writer import write_errors

# Network file systems may show a new file this late elsewhere.
_SEEN_WITHIN_S = 10.0
_POLL_S = 0.2


class Ranks(Protocol):
    """What a team needs of its ranks; all methods are collective."""

    rank: int
    size: int

    def gather_texts(self, text: str) -> list[str]:
        """Every rank's text, by rank, on every rank."""

    def agree(self, error: DistMoeError | None, phase: str) -> None:
        """Raise on all ranks if any rank brings an error."""

    def sleep_until_all(self) -> None:
        """Wait for all ranks without burning a core."""


class OneRank:
    """`Ranks` of a process alone."""

    rank = 0
    size = 1

    def gather_texts(self, text: str) -> list[str]:
        """This rank's text."""
        return [text]

    def agree(self, error: DistMoeError | None, phase: str) -> None:
        """Raise the error, if there is one."""
        if error is not None:
            raise error

    def sleep_until_all(self) -> None:
        """Wait for nobody."""


@dataclass(frozen=True)
class Task:
    """What the leader tells the others.

    Attributes:
        source: Where the checkpoint or store lies that is read, an absolute path.
        directory: Of the new store, an absolute path.
        token: Stands in the lock file, so that ranks see whether theirs is the leader's directory.
        plan: The store's manifest, without files.
        missing: The weight files to be written.
        allow_nonfinite: As in `StoreOptions`.
    """

    source: str
    directory: str
    token: str
    plan: str
    missing: tuple[str, ...]
    allow_nonfinite: bool

    def manifest(self) -> Manifest:
        """The plan, read."""
        return parse_manifest(self.plan, "rank 0's plan")


class Team:
    """The ranks that share the files of one store."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        """Of these ranks; None: this process alone."""
        self._ranks: Ranks = ranks or OneRank()
        self._is_announced = False
        self.rank, self.size = self._ranks.rank, self._ranks.size

    def announce(self, source: Path, directory: Path, plan: Manifest, missing: tuple[str, ...], allow: bool) -> None:
        """Tell the others what is to be written, under the lock, and wait until all can; on the leader, collective.

        Raises:
            DistMoeError: A rank does not see the source or the directory.
        """
        if self.size == 1:
            return
        token = secrets.token_hex(16)
        with write_errors(directory / LOCK_NAME):
            (directory / LOCK_NAME).write_text(token)
        task = Task(str(source.absolute()), str(directory.absolute()), token, plan.render(), missing, allow)
        self._say(json.dumps(asdict(task)))
        self._ranks.agree(None, "starting to pack")

    def dismiss(self) -> None:
        """Tell the others that there is nothing to write, unless they know what; on the leader, collective."""
        if self.size > 1 and not self._is_announced:
            self._say("")

    def _say(self, text: str) -> None:
        self._is_announced = True
        self._ranks.sleep_until_all()
        self._ranks.gather_texts(text)

    def hear(self) -> Task | None:
        """What is to be written, or None; on the others, collective."""
        self._ranks.sleep_until_all()
        text = self._ranks.gather_texts("")[0]
        if not text:
            return None
        fields = json.loads(text)
        return Task(**{**fields, "missing": tuple(fields["missing"])})

    def agree(self, error: DistMoeError | None) -> None:
        """Whether this rank can take part; on the others, collective with `announce`."""
        self._ranks.agree(error, "starting to pack")

    def turn(self, pack: Callable[[], StoreFile | None], record: Callable[[list[StoreFile]], None] | None) -> None:
        """One file on each rank; collective.

        Args:
            pack: Writes this rank's file; None if it has none in this turn.
            record: Takes note of the files of all ranks, also where another rank failed.

        Raises:
            DistMoeError: Some rank met one: raised on all.
        """
        entry, error = None, None
        try:
            entry = pack()
        except DistMoeError as own:
            error = own
        self._ranks.sleep_until_all()
        texts = self._ranks.gather_texts("" if entry is None else json.dumps(asdict(entry)))
        try:
            if record is not None:
                record([StoreFile(**json.loads(text)) for text in texts if text])
        except DistMoeError as own:
            error = error or own
        self._ranks.agree(error, "packing")


def require_same_directory(task: Task) -> None:
    """Make sure that a rank sees the leader's lock.

    Raises:
        PlaceError: It does not.
    """
    lock, until_s = Path(task.directory) / LOCK_NAME, time.monotonic() + _SEEN_WITHIN_S
    while not (files.exists(lock) and lock.read_text(errors="replace") == task.token):
        if time.monotonic() >= until_s:
            raise PlaceError(
                f"{task.directory}: is not the directory that rank 0 writes to; ranks that make a store together need "
                "one directory on a file system that all their hosts share: name one with -o, or start one rank"
            )
        time.sleep(_POLL_S)
