"""A prompt cache: token ids with the keys and values of all layers, in one safetensors file (docs/prompt-cache.md).

n positions · G KV heads · B bytes of K and V of one position of one KV head
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from dist_moe.checkpoint.safetensors_file import RECOPY, SafetensorsFile, file_layout
from dist_moe.errors import CheckpointError, UsageError
from dist_moe.files import NewFile
from dist_moe.kernels import BLOCK_POSITIONS, KvFormat, kv_block_bytes
from dist_moe.model_config import ModelConfig
from dist_moe.store.checksum import RunningChecksum, bytes_of, checksum_text
from dist_moe.store.manifest import NUMERICS_VERSION, Manifest
from dist_moe.store.model_json import model_to_json

FORMAT = "dist-moe prompt cache"
VERSION = "1"
IDS = "ids"

_RENEW = "remove it, and the next run makes it anew, or name another file"
_UNKNOWN = "0" * 16  # stands for the checksum while it is computed
# Of a ModelConfig, what --rope-scaling decides.
_ROPE_FIELDS = ("inv_freq", "attention_factor", "max_positions")

# What must be equal, in the order in which it is compared: the key, what it is, and how to make it so.
_COMPARED = (
    ("version", "format version", "it was written by another dist-moe"),
    ("numerics", "numerics version", "it was written by another dist-moe, whose numbers differ in their last bits"),
    ("source", "model", "give that model"),
    ("weights", "weights", "give the store that it was saved with"),
    ("rope", "rotary settings", "give the same --rope-scaling"),
    ("kv", "KV format", "give the same --kv"),
)


def rope_label(config: ModelConfig) -> str:
    """A model's rotary settings in a few words, with a checksum of all that they decide."""
    bits = checksum_text(config.inv_freq.astype("<f4"), np.float32(config.attention_factor).tobytes())
    return f"{'plain' if config.attention_factor == 1 else 'YaRN'}, frequencies {bits}"


def identity(manifest: Manifest, kv: str) -> dict[str, str]:
    """All that decides the bits of K and V besides the tokens; not how the store was cut into files."""
    model = {key: value for key, value in model_to_json(manifest.config).items() if key not in _ROPE_FIELDS}
    weights = f"{manifest.label}, groups of {manifest.group_size}"
    packed = weights if manifest.formats.uniform_format else manifest.formats.to_json()
    formats = [packed, manifest.router_format.label, manifest.embedding_format.label, model]
    return {
        "format": FORMAT,
        "version": VERSION,
        "numerics": str(NUMERICS_VERSION),
        "source": f"{manifest.source_name}, fingerprint {manifest.source_fingerprint}",
        "weights": f"{weights}, recipe {checksum_text(json.dumps(formats).encode())}",
        "rope": rope_label(manifest.config),
        "kv": kv,
    }


class PromptFile:
    """A whole, undamaged prompt cache; its rows are views of the mapped file.

    Attributes:
        ids: int32 [n], the tokens whose K and V it holds.
    """

    def __init__(self, path: Path) -> None:
        """Map a file and compare its checksum.

        Raises:
            UsageError: It cannot be read, is no prompt cache, or is truncated or damaged.
        """
        self.path = path
        try:
            self._file = SafetensorsFile(path)
        except CheckpointError as error:
            raise UsageError(f"{str(error).removesuffix(f'; {RECOPY}')}; {_RENEW}") from error
        self._metadata = self._file.metadata
        if self._metadata.get("format") != FORMAT:
            raise UsageError(f"{path}: is a safetensors file, but not a prompt cache; name another file")
        self._require_equal("version", VERSION)
        self._require_checksum()
        self.ids: npt.NDArray[np.int32] = self._file.raw(IDS).astype(np.int32)

    def require(self, expected: dict[str, str], config: ModelConfig, row_bytes: int) -> None:
        """Make sure that the file fits what runs.

        Args:
            expected: `identity` of the store and the options.
            config: The model.
            row_bytes: B.

        Raises:
            UsageError: It was saved for something else.
        """
        for key, _, _ in _COMPARED:
            self._require_equal(key, expected[key])
        shape = (len(self.ids), config.kv_heads, row_bytes)
        names = [IDS, *(layer_name(layer) for layer in range(config.layers))]
        fits = self._file.names() == names and all(
            (self._file.dtype(name), self._file.shape(name)) == ("U8", shape) for name in names[1:]
        )
        if not fits or not len(self.ids) or self.ids.min() < 0 or self.ids.max() >= config.vocabulary:
            raise UsageError(f"{self.path}: its tensors are not those of this model; {_RENEW}")

    def rows(self, layer: int, first: int, stop: int) -> npt.NDArray[np.uint8]:
        """K and V of positions [first, stop) of a layer, uint8 [stop - first, G, B]."""
        return self._file.raw(layer_name(layer))[first:stop].view(np.uint8)

    def _require_equal(self, key: str, expected: str) -> None:
        found = self._metadata.get(key, "nothing")
        if found != expected:
            what, remedy = next((what, remedy) for name, what, remedy in _COMPARED if name == key)
            raise UsageError(
                f"{self.path}: was saved with {what} {found}, but here it is {expected}: {remedy}, or {_RENEW}"
            )

    def _require_checksum(self) -> None:
        found = self._metadata.get("checksum", "")
        running = RunningChecksum()
        prefix = self._file.bytes_at(0, 8) + self._file.header
        running.update(prefix.replace(_entry(found), _entry(_UNKNOWN), 1))
        step = 1 << 24
        for first in range(len(prefix), self._file.file_bytes, step):
            running.update(self._file.bytes_at(first, step))
        if running.text() != found:
            raise UsageError(
                f"{self.path}: is damaged: its checksum is {found}, but its contents give {running.text()}; {_RENEW}"
            )


def require_same(file: PromptFile, manifest: Manifest, kv_format: KvFormat) -> None:
    """Refuse a file that was saved for another store or KV format; raises UsageError as `PromptFile.require`."""
    config = manifest.config
    row_bytes = kv_block_bytes(kv_format, config.head_dim) // BLOCK_POSITIONS
    file.require(identity(manifest, kv_format.label), config, row_bytes)


class PromptWriter:
    """Writes a prompt cache; what stood under the name stays until `commit`.

    An error in between is kept for `commit`, so that the ranks can finish what they do together. Used as a context
    manager.
    """

    def __init__(
        self, path: Path, made_with: dict[str, str], ids: Sequence[int], config: ModelConfig, row_bytes: int
    ) -> None:
        """Create a temporary file.

        Args:
            path: Where it will be.
            made_with: `identity`.
            ids: The tokens.
            config: The model.
            row_bytes: B.

        Raises:
            UsageError: Nothing can be written there.
        """
        ids_T = np.array(ids, dtype="<i4")
        shape = (len(ids_T), config.kv_heads, row_bytes)
        tensors = {IDS: ("I32", ids_T.shape)} | {layer_name(layer): ("U8", shape) for layer in range(config.layers)}
        self._header = file_layout(tensors, made_with | {"checksum": _UNKNOWN}, alignment=1).header
        self._checksum = RunningChecksum()
        self._error: UsageError | None = None
        self._file = NewFile(path)
        self._write(bytes_of(self._header))
        self._write(bytes_of(ids_T))

    def append(self, rows: npt.NDArray[np.uint8]) -> None:
        """Write the next rows, uint8 [n, G, B], layer after layer."""
        self._write(bytes_of(np.ascontiguousarray(rows)))

    def commit(self) -> None:
        """Complete the file and give it its name.

        Raises:
            UsageError: It could not be written; what stood there is still there.
        """
        if self._error is not None:
            raise self._error
        self._file.commit(self._header.replace(_entry(_UNKNOWN), _entry(self._checksum.text()), 1))

    def __enter__(self) -> PromptWriter:
        """Return the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was not committed."""
        self._file.__exit__(kind, error, trace)

    def _write(self, data: memoryview) -> None:
        self._checksum.update(data)
        try:
            if self._error is None:
                self._file.write(data)
        except UsageError as error:
            self._error = error


def layer_name(layer: int) -> str:
    """The tensor of a layer: uint8 [n, G, B], rows as in model/kv_layout.py."""
    return f"layers.{layer}"


def _entry(checksum: str) -> bytes:
    """The checksum in the header's JSON."""
    return f'"checksum":"{checksum}"'.encode()
