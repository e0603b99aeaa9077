"""`--prompt-cache`: the file of a run's prompt, checked before any weight is read, restored before the first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_moe import files
from dist_moe.cli.context_options import ContextOptions, PromptCacheOptions
from dist_moe.engine.runtime import Runtime
from dist_moe.errors import UsageError
from dist_moe.kernels import KvFormat
from dist_moe.store.manifest import Manifest
from dist_moe.store.prompt_file import PromptFile, require_same

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedPrompt:
    """A prompt cache; `file` is None if there is none yet."""

    path: Path
    file: PromptFile | None
    read_only: bool
    with_answer: bool

    def check(self, manifest: Manifest, kv: KvFormat) -> None:
        """Refuse a file that was saved for another store, before its weights are read.

        Raises:
            UsageError: What decides the bits differs.
        """
        if self.file is not None:
            require_same(self.file, manifest, kv)

    def require_room(self, context: int) -> None:
        """Refuse a text that is longer than the context, where all of it is to be restored.

        Raises:
            UsageError: It is.
        """
        if self.file is not None and len(self.file.ids) > context:
            raise UsageError(
                f"--prompt-cache {self.path}: holds {len(self.file.ids)} positions, more than the context of {context}"
                ": raise --ctx, or name another file"
            )

    def restore(self, engine: Runtime, prompt_ids: tuple[int, ...] | None = None) -> None:
        """Make resident what a prompt has in common with the saved text, or all of it."""
        if self.file is not None:
            restored = engine.prompt_cache.restore(self.file, prompt_ids)
            logger.info("%s: %d of %d saved tokens are restored", self.path, restored, len(self.file.ids))

    def save(self, engine: Runtime, prompt_ids: tuple[int, ...], generated_ids: Sequence[int]) -> None:
        """Save the prompt, and the answer if that is wanted, unless the file holds them already.

        Raises:
            UsageError: The file cannot be written; an old one is still there.
        """
        self._save(engine, (*prompt_ids, *generated_ids[:-1]) if self.with_answer else prompt_ids)

    def save_latest(self, engine: Runtime) -> None:
        """Save the text that was used last; errors as of `save`."""
        self._save(engine, engine.prompt_cache.latest())

    def _save(self, engine: Runtime, ids: tuple[int, ...]) -> None:
        if self.read_only or (self.file is not None and np.array_equal(self.file.ids[: len(ids)], ids)):
            return
        saved = engine.prompt_cache.save(self.path, ids)
        logger.info("%s: saved %d tokens", self.path, saved)


def read_saved_prompt(options: PromptCacheOptions) -> SavedPrompt | None:
    """What the options name, or None.

    Raises:
        UsageError: The file is damaged, or cannot be read or written, or the options contradict each other.
    """
    with_answer = isinstance(options, ContextOptions) and options.prompt_cache_all
    if options.prompt_cache is None:
        for name, wanted in (("ro", options.prompt_cache_ro), ("all", with_answer)):
            if wanted:
                raise UsageError(f"--prompt-cache-{name} needs --prompt-cache FILE: give both")
        return None
    if options.prompt_cache_ro and with_answer:
        raise UsageError("--prompt-cache-ro and --prompt-cache-all exclude each other: give one of them")
    path = Path(options.prompt_cache)
    if not options.prompt_cache_ro:
        files.require_writable(path)
    found = files.exists(path)
    if options.prompt_cache_ro and not found:
        raise UsageError(
            f"--prompt-cache {path}: there is no such file, and --prompt-cache-ro makes none: drop it once"
        )
    file = PromptFile(path) if found else None
    return SavedPrompt(path, file, options.prompt_cache_ro, with_answer)
