"""A checkpoint becomes a store: planned first, then written file by file, resumable after every file."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dist_moe import files
from dist_moe.checkpoint.source import Source
from dist_moe.errors import PlaceError, StoreError
from dist_moe.kernels import Kernels
from dist_moe.store import state
from dist_moe.store.layout import weight_files, weight_layout
from dist_moe.store.lock import store_lock
from dist_moe.store.manifest import MANIFEST_NAME, PROGRESS_NAME, Manifest, StoreFile
from dist_moe.store.pack import Packer, UnitPacker
from dist_moe.store.plan import StoreOptions, WeightSource, plan_store
from dist_moe.store.weight_file import write_weight_file
from dist_moe.store.writer import FileWriter, write_errors, write_text

# Called with (finished bytes, all bytes, what is being done), often.
Progress = Callable[[int, int, str], None]
# What makes the units of one planned store.
MakePacker = Callable[[Manifest, Kernels], UnitPacker]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """What `convert` did."""

    manifest: Manifest
    written_files: tuple[str, ...]  # empty: the store was there already
    kept_files: tuple[str, ...]  # finished before, by an earlier run


def convert(source: Source, destination: Path, options: StoreOptions, progress: Progress) -> Conversion:
    """Make a store, or finish an interrupted one; a whole one of the same options is left alone.

    Args:
        source: The model.
        destination: The directory of the store; created if need be.
        options: How to make it.
        progress: Told about every piece that is written, and while waiting for another process.

    Raises:
        UsageError: The model cannot be stored like that.
        PlaceError: The destination holds something else, is locked, or cannot be written.
        StoreError: The destination holds another store, or weights are not finite.
    """
    importance = options.importance
    return write_store(
        source, lambda plan, kernels: Packer(source, plan, kernels, importance), destination, options, progress
    )


def write_store(
    source: WeightSource, make_packer: MakePacker, destination: Path, options: StoreOptions, progress: Progress
) -> Conversion:
    """`convert` for any source whose units `make_packer` can make; raises as it does."""
    return write_plan(plan_store(source, options), source.text_files(), make_packer, destination, options, progress)


def write_plan(
    plan: Manifest,
    texts: Mapping[str, bytes],
    make_packer: MakePacker,
    destination: Path,
    options: StoreOptions,
    progress: Progress,
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
        run = _Run(make_packer, destination, options, plan, progress, total_bytes)
        return run.write(texts, finished)


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
        make_packer: MakePacker,
        directory: Path,
        options: StoreOptions,
        plan: Manifest,
        progress: Progress,
        total_bytes: int,
    ) -> None:
        self._make_packer = make_packer
        self._directory = directory
        self._options = options
        self._plan = plan
        self._progress = progress
        self._total_bytes = total_bytes
        self._done_bytes = 0

    def write(self, texts: Mapping[str, bytes], finished: tuple[StoreFile, ...]) -> Conversion:
        """Write what is not finished, the manifest last."""
        plan, entries = self._plan, {entry.name: entry for entry in finished}
        names = [*weight_files(plan), *texts]
        missing = [name for name in names if name not in entries]
        state.begin(self._directory, plan, finished)
        self._done_bytes = sum(entry.file_bytes for entry in finished if entry.name not in texts)
        self._check_space()
        with Kernels(self._options.threads or len(os.sched_getaffinity(0))) as kernels:
            for name in missing:
                entries[name] = self._write_text(name, texts[name]) if name in texts else self._pack(name, kernels)
                written = tuple(entries[known] for known in names if known in entries)
                write_text(self._directory, PROGRESS_NAME, replace(plan, files=written).render())
        manifest = replace(plan, files=tuple(entries[name] for name in names))
        state.complete(self._directory, manifest)
        return Conversion(manifest, tuple(missing), tuple(name for name in names if name not in missing))

    def _pack(self, name: str, kernels: Kernels) -> StoreFile:
        packer = self._make_packer(self._plan, kernels)

        def on_written(count: int) -> None:
            self._done_bytes += count
            self._progress(self._done_bytes, self._total_bytes, name)

        def on_tensor() -> None:
            refuse_nonfinite(self._directory, packer.nonfinite, self._options)

        with FileWriter(self._directory, name, on_written) as file:
            return write_weight_file(file, name, self._plan, packer, on_tensor)

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
