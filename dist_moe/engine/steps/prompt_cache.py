"""Saving what a text computed and restoring it in another run, with any number of ranks; on rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dist_moe.engine.requests.prefix_index import PrefixIndex, common_prefix
from dist_moe.engine.steps.crew import Crew
from dist_moe.errors import UsageError
from dist_moe.kernels import KvFormat
from dist_moe.model.kv_layout import row_bytes
from dist_moe.store.manifest import Manifest
from dist_moe.store.prompt_file import PromptFile, PromptWriter, identity


class PromptCache:
    """K and V of sequences in files: a saved text becomes a resident sequence, which prompts that begin alike reuse."""

    def __init__(self, crew: Crew, prefixes: PrefixIndex, manifest: Manifest, kv_format: KvFormat) -> None:
        """Prepare.

        Args:
            crew: All ranks.
            prefixes: The resident sequences.
            manifest: The store's.
            kv_format: How K and V are kept.
        """
        self._crew = crew
        self._prefixes = prefixes
        self._config = manifest.config
        self._identity = identity(manifest, kv_format.label)
        self._row_bytes = row_bytes(kv_format, manifest.config.head_dim)

    def restore(self, file: PromptFile, ids: Sequence[int] | None = None) -> int:
        """Make a saved text resident.

        Args:
            file: The open file.
            ids: A prompt: only what it has in common with the saved text is restored; None: all of it.

        Returns:
            Positions restored.

        Raises:
            UsageError: The file was saved for another model, store, KV format or version, or nothing may stay resident.
        """
        file.require(self._identity, self._config, self._row_bytes)
        positions = len(file.ids) if ids is None else common_prefix(file.ids, np.array(ids, np.int32))
        if not self._prefixes.fits(positions):
            raise UsageError(
                f"{file.path}: holds {positions} positions, more than may stay resident: raise --ctx or `resident`"
            )
        if positions:
            sequence = self._prefixes.new_sequences()
            self._crew.restore(sequence, positions, file.rows)
            self._prefixes.keep(sequence, file.ids[:positions].tolist())
        return positions

    def latest(self) -> tuple[int, ...]:
        """The resident text that was used last; empty if there is none."""
        return self._prefixes.latest()

    def save(self, path: Path, ids: Sequence[int]) -> int:
        """Save what is resident of a text.

        Args:
            path: A file, replaced when the new one is whole.
            ids: The text.

        Returns:
            Positions saved; with none nothing is written.

        Raises:
            UsageError: The file cannot be written; the old one is still there.
        """
        sequence, positions = self._prefixes.find(ids)
        if not positions:
            return 0
        with PromptWriter(path, self._identity, ids[:positions], self._config, self._row_bytes) as writer:
            self._crew.save(sequence, positions, writer.append)
            writer.commit()
        return positions
