"""The packed models in a cache directory: what each one is, and how it is removed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dist_moe.errors import DistMoeError, PlaceError, UsageError
from dist_moe.store.lock import refuse_used, store_lock
from dist_moe.store.manifest import MANIFEST_NAME, PROGRESS_NAME, Manifest, read_manifest
from dist_moe.store.state import remove_store, remove_texts

# What `store.models` calls a directory: the model, the format (or that it is the text of a GGUF file), a fingerprint.
_NAME = re.compile(r"(.+?)-((?:f32|bf16|q8|q4)(?:-mixed)?|text)-[0-9a-f]{12}")
_TEXT = "text"

State = Literal["complete", "incomplete", "damaged"]


@dataclass(frozen=True)
class CachedModel:
    """One directory of the cache.

    Attributes:
        name: The directory's name.
        source: What the model is called.
        format: Of its weights; "text" for the tokenizer and settings of a GGUF file.
        bytes: On disk.
        used_s: When it was last used, in seconds since the epoch.
        state: Whether a run can use it as it is.
    """

    name: str
    source: str
    format: str
    bytes: int
    used_s: float
    state: State


def cached_models(cache: Path) -> list[CachedModel]:
    """What is in a cache directory, the last used first; what is not ours is passed over.

    Raises:
        UsageError: The directory cannot be read.
    """
    return sorted((_describe(path) for path in _directories(cache)), key=lambda model: (-model.used_s, model.name))


def remove_cached(cache: Path, name: str) -> None:
    """Remove a model that nobody uses, and nothing else: a directory with other files in it stays, with them.

    Args:
        cache: The cache directory.
        name: As `cached_models` says.

    Raises:
        UsageError: There is none of that name.
        PlaceError: A run uses it, a process is writing it, or the system refuses.
    """
    directory = next((path for path in _directories(cache) if path.name == name), None)
    if directory is None:
        raise UsageError(f"{cache} holds no packed model called {name!r}: see dist-moe cache ls")
    with store_lock(directory, None):
        refuse_used(directory / MANIFEST_NAME)
        remove_store(directory)
        if _format_of(directory) == _TEXT:
            remove_texts(directory)
    try:
        directory.rmdir()
    except OSError as error:
        left = sorted(path.name for path in directory.iterdir())
        what = f"it also holds {', '.join(left[:3])}" if left else str(error.strerror)
        raise PlaceError(f"{directory}: the model is removed, the directory is not: {what}") from error


def note_use(directory: Path) -> None:
    """Make this the time of a cached model's last use, where that can be written."""
    with suppress(OSError):
        os.utime(directory)


def _directories(cache: Path) -> Iterator[Path]:
    try:
        paths = sorted(cache.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{cache}: cannot be read ({error.strerror}): check DIST_MOE_CACHE") from error
    for path in paths:
        if _NAME.fullmatch(path.name) and not path.is_symlink() and path.is_dir() and _is_ours(path):
            yield path


def _is_ours(directory: Path) -> bool:
    if _format_of(directory) == _TEXT:
        return True
    return any((directory / name).is_file() for name in (MANIFEST_NAME, PROGRESS_NAME))


def _format_of(directory: Path) -> str:
    found = _NAME.fullmatch(directory.name)
    assert found is not None
    return found[2]


def _describe(directory: Path) -> CachedModel:
    manifest, state = _manifest(directory)
    sizes = [path.lstat().st_size for path in directory.iterdir()]
    return CachedModel(
        name=directory.name,
        source=manifest.source_name if manifest else _NAME.sub(r"\1", directory.name),
        format=_format_of(directory),
        bytes=sum(sizes),
        used_s=directory.stat().st_mtime,
        state=state,
    )


def _manifest(directory: Path) -> tuple[Manifest | None, State]:
    if _format_of(directory) == _TEXT:
        return None, "complete"
    states: list[tuple[str, State]] = [(MANIFEST_NAME, "complete"), (PROGRESS_NAME, "incomplete")]
    name, state = next((name, state) for name, state in states if (directory / name).is_file())
    try:
        manifest = read_manifest(directory / name)
    except DistMoeError:
        return None, "damaged"
    whole = all((directory / entry.name).is_file() for entry in manifest.files)
    return manifest, state if whole else "damaged"
