"""What stands in the directory that a store is to be written to, and what may be removed from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dist_moe import files
from dist_moe.checkpoint.reader import TEXT_FILES
from dist_moe.errors import PlaceError, StoreError
from dist_moe.store.checksum import checksum_text
from dist_moe.store.layout import weight_files
from dist_moe.store.lock import LOCK_NAME
from dist_moe.store.manifest import MANIFEST_NAME, PROGRESS_NAME, Manifest, StoreFile, read_manifest
from dist_moe.store.reader import FULL_CHECK_BYTES
from dist_moe.store.verify import check_file, check_header
from dist_moe.store.writer import PARTIAL_SUFFIX, partial_name, sync_directory, write_errors, write_text

_WEIGHT_FILE = re.compile(r"common\.safetensors|shard-\d{5}-of-\d{5}\.safetensors")


def prepare_directory(directory: Path) -> None:
    """Create the directory of a store, or make sure that it is one, or empty.

    Raises:
        PlaceError: It is a file, cannot be created, or holds something else.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in directory.iterdir()}
    except OSError as error:
        raise PlaceError(f"{directory}: cannot be used as a directory ({error.strerror}); clear the way") from None
    foreign = sorted(name for name in names if not _is_transient(name))
    if foreign and not names & {MANIFEST_NAME, PROGRESS_NAME}:
        raise PlaceError(
            f"{directory}: is not empty and not a store (it holds {foreign[0]}); nothing was changed: remove it"
        )


def finished_files(
    directory: Path, plan: Manifest, texts: Mapping[str, bytes], *, full_check: bool = False
) -> tuple[StoreFile, ...]:
    """The intact files of the store that stands here, made with the same options from the same source.

    Args:
        directory: The store, perhaps an interrupted one, or an empty directory.
        plan: What the store is to be.
        texts: The source's small files, kept as they are; a copy that differs from its original is not intact.
        full_check: Read large files whole, too, not only their headers.

    Raises:
        StoreError: There is a store of other options or another version, or its record is damaged.
    """
    record = _record(directory)
    if record is None:
        return ()
    found = read_manifest(record)
    differences = _differences(found, plan)
    if differences:
        raise StoreError(
            f"{directory}: holds a store made with other options ({differences}); choose another directory"
        )
    names = [*weight_files(plan), *texts]
    intact = (entry for entry in found.files if entry.name in names and _is_intact(directory, entry, found, full_check))
    return tuple(
        entry for entry in intact if entry.name not in texts or checksum_text(texts[entry.name]) == entry.checksum
    )


def is_complete(directory: Path, plan: Manifest, finished: tuple[StoreFile, ...]) -> bool:
    """Whether a store is whole: its manifest stands, and every file that it lists is finished."""
    if not files.exists(directory / MANIFEST_NAME):
        return False
    listed = {entry.name for entry in read_manifest(directory / MANIFEST_NAME).files}
    return listed == {entry.name for entry in finished} and listed >= set(weight_files(plan))


def weight_bytes(directory: Path, plan: Manifest) -> int:
    """Bytes of a store's weight files that another process has written so far."""
    names = weight_files(plan)
    total = 0
    for name in [*names, *(partial_name(name) for name in names)]:
        with suppress(OSError):
            total += (directory / name).stat().st_size
    return total


def begin(directory: Path, plan: Manifest, finished: tuple[StoreFile, ...]) -> None:
    """Mark a store as incomplete: the record of finished files first, then no manifest."""
    write_text(directory, PROGRESS_NAME, replace(plan, files=finished).render())
    with write_errors(directory):
        (directory / MANIFEST_NAME).unlink(missing_ok=True)
        kept = {entry.name for entry in finished}
        for path in list(directory.iterdir()):
            stale = path.name in TEXT_FILES and path.name not in kept
            if stale or (path.name.endswith(PARTIAL_SUFFIX) and _is_transient(path.name)):
                path.unlink()


def complete(directory: Path, manifest: Manifest) -> None:
    """Give a finished store its manifest, the last thing to appear."""
    write_text(directory, MANIFEST_NAME, manifest.render())
    with write_errors(directory):
        (directory / PROGRESS_NAME).unlink(missing_ok=True)


def remove_store(directory: Path) -> None:
    """Remove the files that belong to a store, and nothing else; without a manifest or a record there is none."""
    names = {path.name for path in directory.iterdir()}
    if not names & {MANIFEST_NAME, PROGRESS_NAME}:
        return
    ours = {name for name in names if _WEIGHT_FILE.fullmatch(name) or name in TEXT_FILES}
    ours |= {name for name in names if _is_transient(name) and name not in (LOCK_NAME, PROGRESS_NAME)}
    with write_errors(directory):
        # What makes this a store goes last: an interrupted removal can be repeated.
        for name in [*sorted(ours), PROGRESS_NAME, MANIFEST_NAME]:
            (directory / name).unlink(missing_ok=True)
        sync_directory(directory)


def remove_texts(directory: Path) -> None:
    """Remove the small files that a model takes along, where there is no store."""
    with write_errors(directory):
        for path in list(directory.iterdir()):
            transient = path.name != LOCK_NAME and _is_transient(path.name)
            if path.name in TEXT_FILES or transient:
                path.unlink(missing_ok=True)


def _record(directory: Path) -> Path | None:
    paths = (directory / name for name in (MANIFEST_NAME, PROGRESS_NAME))
    return next((path for path in paths if files.exists(path)), None)


def _is_transient(name: str) -> bool:
    partial = name.startswith(".") and name.endswith(PARTIAL_SUFFIX)
    if not partial:
        return name in (LOCK_NAME, PROGRESS_NAME)
    final = name[1 : -len(PARTIAL_SUFFIX)]
    return bool(_WEIGHT_FILE.fullmatch(final)) or final in (MANIFEST_NAME, PROGRESS_NAME, *TEXT_FILES)


def _is_intact(directory: Path, entry: StoreFile, found: Manifest, full_check: bool) -> bool:
    path = directory / entry.name
    try:
        if full_check or entry.file_bytes < FULL_CHECK_BYTES:
            check_file(path, entry, found)
        else:
            check_header(path, entry)
    except StoreError:
        return False
    return True


def _differences(found: Manifest, plan: Manifest) -> str:
    theirs, ours = found.recipe(), plan.recipe()
    if theirs == ours:
        return ""
    named = ("weights", "group_size", "experts", "nodes")
    texts = [f"{key} {theirs[key]}, not {ours[key]}" for key in named if theirs[key] != ours[key]]
    if (found.label, found.group_size) == (plan.label, plan.group_size) and found.formats != plan.formats:
        texts.append("other formats of some matrices")
    if found.scales != plan.scales:
        texts.append(f"scales {found.scales.label}, not {plan.scales.label}")
    if found.importance != plan.importance:
        texts.append(f"importance {found.importance or 'none'}, not {plan.importance or 'none'}")
    if theirs["source"] != ours["source"] or theirs["model"] != ours["model"] or not texts:
        texts.append(
            f"source {found.source_name} in another version"
            if found.source_name == plan.source_name
            else f"source {found.source_name}, not {plan.source_name}"
        )
    return ", ".join(texts)
