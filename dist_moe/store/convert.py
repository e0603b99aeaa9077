"""A checkpoint becomes a store: planned first, then written file by file, resumable after every file."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dist_moe import files
from dist_moe.checkpoint.source import Source
from dist_moe.errors import DistMoeError, PlaceError, StoreError
from dist_moe.kernels import Kernels
from dist_moe.store import state
from dist_moe.store.importance import Importance
from dist_moe.store.layout import weight_files, weight_layout
from dist_moe.store.lock import store_lock
from dist_moe.store.manifest import MANIFEST_NAME, PROGRESS_NAME, Manifest, StoreFile
from dist_moe.store.pack import Packer, UnitPacker
from dist_moe.store.plan import StoreOptions, WeightSource, plan_store
from dist_moe.store.team import Team, require_same_directory
from dist_moe.store.weight_file import write_weight_file
from dist_moe.store.writer import FileWriter, write_errors, write_text

# Called with (finished bytes, all bytes, what is being done), often.
Progress = Callable[[int, int, str], None]
# What makes the units of one planned store.
MakePacker = Callable[[Manifest, Kernels], UnitPacker]

_LOOK_EVERY_S = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """What a store is made of.

    Attributes:
        path: Where it lies.
        make_packer: What makes the units of the planned store.
    """

    path: Path
    make_packer: MakePacker


@dataclass(frozen=True)
class Conversion:
    """What `convert` did."""

    manifest: Manifest
    written_files: tuple[str, ...]  # empty: the store was there already
    kept_files: tuple[str, ...]  # finished before, by an earlier run


def convert(
    source: Source, destination: Path, options: StoreOptions, progress: Progress, team: Team | None = None
) -> Conversion:
    """Make a store, or finish an interrupted one; a whole one of the same options is left alone.

    Args:
        source: The model.
        destination: The directory of the store; created if need be.
        options: How to make it.
        progress: Told about every piece that is written, and while waiting for another process.
        team: The ranks that share the files, on their leader; None: this process alone.

    Raises:
        UsageError: The model cannot be stored like that.
        PlaceError: The destination holds something else, is locked, or cannot be written.
        StoreError: The destination holds another store, or weights are not finite.
    """
    plan, texts = plan_store(source, options), source.text_files()
    return write_plan(plan, texts, checkpoint_origin(source, options.importance), destination, options, progress, team)


def checkpoint_origin(source: Source, importance: Importance | None) -> Origin:
    """A model that is packed, its columns weighted by importance where that is known."""
    return Origin(source.path, lambda plan, kernels: Packer(source, plan, kernels, importance))


def write_store(
    source: WeightSource, make_packer: MakePacker, destination: Path, options: StoreOptions, progress: Progress
) -> Conversion:
    """`convert` for any source whose units `make_packer` can make; raises as it does."""
    origin = Origin(source.path, make_packer)
    return write_plan(plan_store(source, options), source.text_files(), origin, destination, options, progress)


def write_plan(
    plan: Manifest,
    texts: Mapping[str, bytes],
    origin: Origin,
    destination: Path,
    options: StoreOptions,
    progress: Progress,
    team: Team | None = None,
) -> Conversion:
    """`write_store` of a store that is planned already, with its small files; raises as it does."""
    state.prepare_directory(destination)
    total_bytes = sum(weight_layout(plan, name).file_bytes for name in weight_files(plan))

    def on_wait() -> None:
        progress(
            state.weight_bytes(destination, plan), total_bytes, "waiting for another process that writes this store"
        )

    if not options.force and (there := _already_there(destination, plan, texts, options)):
        return there
    with store_lock(destination, on_wait if options.wait else None):
        if options.force:
            state.remove_store(destination)
        elif there := _already_there(destination, plan, texts, options):
            return there  # another process has finished it meanwhile
        finished = _usable_files(destination, plan, texts, options)
        refuse_nonfinite(destination, replace(plan, files=finished).nonfinite, options)
        run = _Run(origin, destination, options, plan, progress, total_bytes, team or Team())
        return run.write(texts, finished)


def help_write(team: Team, open_origin: Callable[[Path, Manifest], Origin], threads: int) -> None:
    """What the other ranks do while the leader is in `convert` or `recut`, until it needs no help; collective.

    Args:
        team: All ranks.
        open_origin: Opens the leader's source, told its path and the plan.
        threads: That pack on this rank; 0: as many as it may use CPUs.

    Raises:
        DistMoeError: Some rank failed: raised on all, where `Team` agrees on errors.
    """
    task = team.hear()
    if task is None:
        return
    run, error = None, None
    try:
        require_same_directory(task)
        plan, options = task.manifest(), StoreOptions(threads=threads, allow_nonfinite=task.allow_nonfinite)
        origin = open_origin(Path(task.source), plan)
        run = _Run(origin, Path(task.directory), options, plan, lambda *_: None, 0, team)
    except DistMoeError as own:
        error = own
    team.agree(error)
    assert run is not None
    run.pack_in_turns(task.missing, None)


def _already_there(
    directory: Path, plan: Manifest, texts: Mapping[str, bytes], options: StoreOptions
) -> Conversion | None:
    """The whole store that stands here, seen without the lock, so that it may lie where nothing can be written."""
    try:
        finished = state.finished_files(directory, plan, texts, full_check=options.full_check)
        refuse_nonfinite(directory, replace(plan, files=finished).nonfinite, options)
        if state.is_complete(directory, plan, finished):
            return Conversion(replace(plan, files=finished), (), tuple(entry.name for entry in finished))
    except StoreError:
        return None  # perhaps another process is changing it: look again under the lock
    return None


def _usable_files(
    directory: Path, plan: Manifest, texts: Mapping[str, bytes], options: StoreOptions
) -> tuple[StoreFile, ...]:
    """What need not be written again; in our own cache, where nobody else will mend it, a damaged store is said."""
    was_whole = files.exists(directory / MANIFEST_NAME)
    try:
        finished = state.finished_files(directory, plan, texts, full_check=options.full_check)
    except StoreError as error:
        if not options.replace_damaged:
            raise StoreError(f"{error}; or replace the store with --force") from None
        reason = str(error).split("; ")[0]  # without the advice, which is for stores that somebody else keeps
        logger.warning("a packed model in the cache is damaged and is packed again: %s", reason)
        state.remove_store(directory)
        return ()
    if was_whole and options.replace_damaged:
        names = [*weight_files(plan), *texts]
        damaged = sorted(set(names) - {entry.name for entry in finished})
        logger.warning("%s: damaged or missing, packed again: %s", directory, ", ".join(damaged))
    return finished


def refuse_nonfinite(directory: Path, counts: Mapping[str, int], options: StoreOptions) -> None:
    """Refuse weights that are not finite unless the options allow them; names every tensor that has some."""
    if counts and not options.allow_nonfinite:
        named = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
        raise StoreError(
            f"{directory}: the source has weights that are NaN, infinite or too large for their format ({named}); "
            "download the checkpoint again, or pack it with dist-moe shard --allow-nonfinite"
        )


class _Run:
    """The writing part of one conversion, under the lock."""

    def __init__(
        self,
        origin: Origin,
        directory: Path,
        options: StoreOptions,
        plan: Manifest,
        progress: Progress,
        total_bytes: int,
        team: Team,
    ) -> None:
        self._origin, self._team = origin, team
        self._directory = directory
        self._options = options
        self._plan = plan
        self._progress = progress
        self._total_bytes = total_bytes
        self._done_bytes = self._seen_bytes = 0
        self._next_look_s = 0.0

    def write(self, texts: Mapping[str, bytes], finished: tuple[StoreFile, ...]) -> Conversion:
        """Write what is not finished, the manifest last."""
        plan, entries = self._plan, {entry.name: entry for entry in finished}
        names = [*weight_files(plan), *texts]
        missing = [name for name in names if name not in entries]
        state.begin(self._directory, plan, finished)
        self._done_bytes = sum(entry.file_bytes for entry in finished if entry.name not in texts)
        self._check_space()

        def record(made: list[StoreFile]) -> None:
            entries.update((entry.name, entry) for entry in made)
            written = tuple(entries[known] for known in names if known in entries)
            write_text(self._directory, PROGRESS_NAME, replace(plan, files=written).render())
            self._done_bytes = sum(entry.file_bytes for entry in written if entry.name not in texts)

        weights = tuple(name for name in missing if name not in texts)
        allow = self._options.allow_nonfinite
        self._team.announce(self._origin.path, self._directory, plan, weights, allow)
        self.pack_in_turns(weights, record)
        for name in missing[len(weights) :]:
            record([self._write_text(name, texts[name])])
        manifest = replace(plan, files=tuple(entries[name] for name in names))
        state.complete(self._directory, manifest)
        return Conversion(manifest, tuple(missing), tuple(name for name in names if name not in missing))

    def pack_in_turns(self, names: Sequence[str], record: Callable[[list[StoreFile]], None] | None) -> None:
        """Write weight files, one per rank and turn; collective."""
        team = self._team
        if team.size > 1:  # the files of a turn take as long as its largest
            names = sorted(names, key=lambda name: -weight_layout(self._plan, name).file_bytes)
        with Kernels(self._options.threads or len(os.sched_getaffinity(0))) as kernels:
            for own in range(team.rank, team.rank + len(names), team.size):
                name = names[own] if own < len(names) else None
                team.turn(partial(self._pack_some, name, kernels), record)

    def _pack_some(self, name: str | None, kernels: Kernels) -> StoreFile | None:
        return None if name is None else self._pack(name, kernels)

    def _pack(self, name: str, kernels: Kernels) -> StoreFile:
        packer = self._origin.make_packer(self._plan, kernels)

        def on_written(count: int) -> None:
            self._done_bytes += count
            self._progress(self._done_by_all(), self._total_bytes, name)

        def on_tensor() -> None:
            refuse_nonfinite(self._directory, packer.nonfinite, self._options)

        with FileWriter(self._directory, name, on_written) as file:
            return write_weight_file(file, name, self._plan, packer, on_tensor)

    def _done_by_all(self) -> int:
        """Bytes written so far; of other ranks as of the last second, because looking takes calls of the system."""
        if self._team.size == 1:
            return self._done_bytes
        now_s = time.monotonic()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + _LOOK_EVERY_S
            self._seen_bytes = state.weight_bytes(self._directory, self._plan)
        return self._seen_bytes

    def _write_text(self, name: str, text: bytes) -> StoreFile:
        with FileWriter(self._directory, name, lambda _: None) as file:
            file.write(text)
            return file.finish({})

    def _check_space(self) -> None:
        needed_bytes = self._total_bytes - self._done_bytes
        with write_errors(self._directory):
            free_bytes = shutil.disk_usage(self._directory).free
        if free_bytes < needed_bytes:
            raise PlaceError(
                f"{self._directory}: the disk is too full: {needed_bytes} bytes needed, {free_bytes} free; make room"
            )
