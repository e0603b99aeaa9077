"""The directory that moe.cc's `export.py --outdir` writes: a QW3W file per tensor, manifest.json and config.json.

manifest.json: {"model": ..., "quant": ..., "tensors": [{"name": ..., "file": ..., "shape": ..., ...}, ...]}.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dist_moe import files
from dist_moe.checkpoint.qw3w_file import Qw3wFile, Record
from dist_moe.errors import CheckpointError

MANIFEST = "manifest.json"
_WHAT = "of a QW3W directory (export.py --outdir)"
_EXPORT_AGAIN = "export the model again"
MOST_MANIFEST_BYTES = 1 << 26  # Qwen3-235B has 37,000 tensors, 250 bytes each


def is_qw3w_directory(path: Path) -> bool:
    """Whether a manifest.json stands there that names a file for each tensor, as that of a store does not."""
    manifest = path / MANIFEST
    if not files.is_file(manifest):
        return False
    try:
        return manifest.stat().st_size <= MOST_MANIFEST_BYTES and _tensors_of(manifest) is not None
    except (OSError, ValueError):
        return False


class Qw3wDirectory:
    """The files of such a directory as one; each is mapped while it is read, as 19,000 could not stay open.

    Attributes:
        file_bytes: The size of all of them.
        records: Everything in them, by name.

    Raises:
        CheckpointError: A file is missing, damaged, or holds another tensor than manifest.json says.
    """

    def __init__(self, path: Path) -> None:
        """Find the records of all files."""
        self.path = path
        self.records: dict[str, Record] = {}
        self.file_bytes = 0
        entries = _tensors_of(path / MANIFEST)
        if not entries:
            raise CheckpointError(f"{path / MANIFEST}: names no tensor, as that {_WHAT} does; {_EXPORT_AGAIN}")
        digest = hashlib.sha256()
        for entry in entries:
            file = self._open(entry)
            digest.update(f"{entry['name']} {file.file_bytes} {file.fingerprint(2, 256)}\n".encode())
            self.file_bytes += file.file_bytes
        self._digest = digest

    def fingerprint(self, samples: int, sample_bytes: int) -> str:
        """A SHA-256 (hex) of what describes the records and of begin and end of each file."""
        return self._digest.hexdigest()

    def _open(self, entry: dict[str, Any]) -> Qw3wFile:
        name, file_name = entry["name"], entry["file"]
        path = self.path / file_name
        if Path(file_name).name != file_name or not files.is_file(path):
            raise CheckpointError(
                f"{path}: is missing, but {MANIFEST} beside it says that it holds {name}: copy the directory again"
            )
        file = Qw3wFile(path, keep_mapped=False)
        for found in file.records:
            if found != name and found.rpartition(".")[0] != name:
                raise CheckpointError(f"{path}: holds {found}, but {MANIFEST} beside it says {name}; {_EXPORT_AGAIN}")
            if found in self.records:
                raise CheckpointError(f"{path}: holds {found}, which {MANIFEST} names twice; {_EXPORT_AGAIN}")
        self.records |= file.records
        return file


def _tensors_of(manifest: Path) -> list[dict[str, Any]] | None:
    """Its list of tensors; None if it is something else."""
    data = files.read_bytes(manifest)
    if b'"tensors"' not in data:  # as in a store's, which may be long
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    entries = found.get("tensors") if isinstance(found, dict) else None
    if not isinstance(entries, list):
        return None
    whole = all(isinstance(entry, dict) and _are_texts(entry.get("name"), entry.get("file")) for entry in entries)
    return entries if whole else None


def _are_texts(*values: object) -> bool:
    return all(isinstance(value, str) for value in values)
