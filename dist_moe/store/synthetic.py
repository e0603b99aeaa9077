"""A store of random packed weights, for measuring: written at the disk's speed, without a checkpoint.

Codes and scales are cuts of one random block, so that no time goes into making numbers. The scales keep activations
near 1 in every layer; embedding and routers are random, so that routing varies by token. Padding is random, too.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe.errors import UsageError
from dist_moe.kernels import WeightFormat, aligned_empty
from dist_moe.kernels.formats import ALIGNMENT, TILE_ROWS, ScaleChoice
from dist_moe.model_config import ModelConfig, round_up
from dist_moe.store.convert import Conversion, Progress, write_store
from dist_moe.store.layout import TensorSpec
from dist_moe.store.manifest import Manifest
from dist_moe.store.model_json import model_to_json
from dist_moe.store.pack import Packed
from dist_moe.store.plan import StoreOptions
from dist_moe.store.unit_parts import UnitPart, unit_parts
from dist_moe.store.units import UnitKind

VERSION = 1  # of the numbers below: another one gives other stores
SEED = 20261121
_BLOCK_BYTES = 64 << 20
_PIECE_ROWS = 2048  # of the embedding

# Root mean square of what a matrix makes of a vector of root mean square 1.
_OUTPUT_RMS = {"rows": 1.0, "output": 0.5, "down": 1.0, "vocabulary": 3.0, "router": 2.0, "embedding": 1.0}
_CODE_RMS = {WeightFormat.Q8: 73.6, WeightFormat.Q4: 4.64}  # of uniform codes


@dataclass(frozen=True)
class SyntheticModel:
    """A model whose weights are random: as a source of stores (`WeightSource`), it has no files."""

    config: ModelConfig
    name: str

    @property
    def path(self) -> Path:
        """A path that ends in the name; there is no such directory."""
        return Path(self.name)

    def names(self) -> list[str]:
        """The tensors whose type matters for the plan of a store."""
        return ["embedding", *(f"layers.{i}.router" for i in range(self.config.layers) if not self.config.is_dense(i))]

    def source_dtype(self, name: str) -> str:
        """As released models have it."""
        return "bf16"

    def fingerprint(self) -> str:
        """Of the architecture, the seed and the version of this file."""
        text = f"{VERSION} {SEED} {sorted(model_to_json(self.config).items())}"
        return "synthetic-" + hashlib.sha256(text.encode()).hexdigest()

    def text_files(self) -> Mapping[str, bytes]:
        """None."""
        return {}


def synthetic_model(config: ModelConfig, name: str, layers: int | None) -> SyntheticModel:
    """A model of random weights, cut to its first `layers` layers.

    Raises:
        UsageError: The architecture has fewer layers.
    """
    if layers is not None and layers > config.layers:
        raise UsageError(f"--layers {layers}: {name} has {config.layers} layers; give 1 to {config.layers}")
    count = config.layers if layers is None else layers
    dense_layers = tuple(layer for layer in config.dense_layers if layer < count)
    return SyntheticModel(replace(config, layers=count, dense_layers=dense_layers), f"synthetic-{name}-{count}-layers")


def write_synthetic(model: SyntheticModel, destination: Path, options: StoreOptions, progress: Progress) -> Conversion:
    """Write a store of random weights, or finish an interrupted one; a whole one is left alone. Raises as `convert`."""
    options = replace(options, scales=ScaleChoice.ABSMAX)  # random scales were not searched for
    return write_store(model, lambda plan, _: SyntheticPacker(plan), destination, options, progress)


class SyntheticPacker:
    """Makes the units of one store (`UnitPacker`): the same bytes on every machine."""

    def __init__(self, manifest: Manifest) -> None:
        """Draw the random block, 64 MiB, and what is derived from it."""
        self._manifest = manifest
        self._config = manifest.config
        words = np.random.PCG64(SEED).random_raw(_BLOCK_BYTES // 8).astype("<u8")
        block = words.view(np.uint8)
        self._codes = {WeightFormat.Q8: np.maximum(block, 1), WeightFormat.Q4: block}  # q8 has no -128
        signed = words.view("<i2")[: _BLOCK_BYTES // 8]
        self._uniform = signed.astype(np.float32) * np.float32(3**0.5 / 32768)  # root mean square 1
        # 3/4 to 5/4, either sign: codes have a mean of -1/2, which signs keep from adding up.
        self._scales = np.copysign(np.abs(signed).astype(np.float32) / 65536 + np.float32(0.75), signed)

    @property
    def nonfinite(self) -> Mapping[str, int]:
        """Nothing: random weights are finite."""
        return {}

    def units(self, kind: UnitKind, layer: int, indices: Sequence[int], counted: Sequence[bool]) -> Iterator[Packed]:
        """The packed units in order, uint8 [unit bytes] each."""
        for index in indices:
            yield self._unit(kind, layer, index)

    def _unit(self, kind: UnitKind, layer: int, index: int) -> Packed:
        parts = unit_parts(self._manifest, kind, layer, index)
        unit: Packed = aligned_empty(parts[-1].bytes.stop, np.uint8)
        for number, part in enumerate(parts):
            self._fill(unit[part.bytes], part, self._rms(part.key, layer), f"{kind} {layer} {index} {number}")
        return unit

    def common(self, spec: TensorSpec) -> Iterator[npt.NDArray[Any]]:
        """One tensor of the common file in pieces: norms are ones, biases zeros."""
        if spec.dtype == "U8":
            columns = self._config.model_dim
            rms = _OUTPUT_RMS["router"] / columns**0.5
            yield _bf16(self._cut(self._uniform, spec.shape[0] // 2, spec.name) * np.float32(rms)).view(np.uint8)
        elif len(spec.shape) == 2:
            rows, columns = spec.shape
            for first in range(0, rows, _PIECE_ROWS):
                count = min(_PIECE_ROWS, rows - first)
                values = self._cut(self._uniform, count * columns, f"{spec.name} {first}")
                yield _bf16(values * np.float32(_OUTPUT_RMS["embedding"])).reshape(count, columns)
        else:
            yield np.full(spec.shape, 0.0 if spec.name.endswith("bias") else 1.0, "<f4")

    def _rms(self, key: str, layer: int) -> float:
        """Of the weights of a matrix."""
        config = self._config
        inputs: dict[str, int] = {"o": config.heads * config.head_dim, "down": config.layer_hidden(layer)}
        outputs = {"o": "output", "down": "down", "lm_head": "vocabulary"}
        rms: float = _OUTPUT_RMS[outputs.get(key, "rows")] / inputs.get(key, config.model_dim) ** 0.5
        return rms

    def _fill(self, packed: Packed, part: UnitPart, rms: float, name: str) -> None:
        fmt, group = part.format.format, part.format.group
        if not fmt.quantized:
            values = self._cut(self._uniform, len(packed) // (4 if fmt == WeightFormat.F32 else 2), name)
            values = values * np.float32(rms)
            packed[:] = (values.astype("<f4") if fmt == WeightFormat.F32 else _bf16(values)).view(np.uint8)
            return
        packed[:] = self._cut(self._codes[fmt], len(packed), name)
        tiles = -(-part.rows // TILE_ROWS)
        values_per_tile = TILE_ROWS * (-(-part.columns // group) if group else 1)
        scales = self._cut(self._scales, tiles * values_per_tile, name + " scales").reshape(tiles, -1)
        halves = (scales * np.float32(rms / _CODE_RMS[fmt])).astype("<f2")
        bytes_t = packed.reshape(tiles, -1)
        bytes_t[:, : 2 * values_per_tile] = halves.view(np.uint8)
        bytes_t[:, 2 * values_per_tile : round_up(2 * values_per_tile, ALIGNMENT)] = 0

    def _cut(self, pool: npt.NDArray[Any], count: int, name: str) -> npt.NDArray[Any]:
        """`count` values of a pool from a place that follows from the name, repeating the pool if need be."""
        if count > len(pool):
            return np.resize(pool, count)
        steps = (len(pool) - count) // ALIGNMENT + 1
        first = zlib.crc32(name.encode()) % steps * ALIGNMENT
        return pool[first : first + count]


def _bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper half of each float's bits: as good as rounding where the values are random."""
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2")
