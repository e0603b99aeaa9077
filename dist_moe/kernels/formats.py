"""The packed formats of weights and of the key/value cache: names and sizes in bytes, without the extension.

D model dim, P head dim. The layouts themselves are written down in reference.py; dist_moe.h has the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from dist_moe.errors import UsageError
from dist_moe.model_config import round_up

TILE_ROWS = 16
GROUP = 32  # values per activation scale, and the granularity of packed columns
BLOCK_POSITIONS = 64
VOCABULARY_BLOCK = 128
ALIGNMENT = 64  # bytes; every packed tile, unit and cache block begins on such a boundary
NO_FAULT = 0x7FFFFFFF


class FaultKind(IntEnum):
    """What went wrong with a token (`dm_fault_kind`); a fault is `layer << 8 | kind`."""

    QUANTIZER = 1
    KEY_VALUE = 2
    CONTRIBUTION = 3
    SUM = 4
    ROUTER = 5
    LOGIT = 6


class OperandParts(IntFlag):
    """The parts of an operand that weights read (`dm_operand_part`)."""

    FLOATS = 1
    INT8 = 2


class WeightFormat(IntEnum):
    """Formats of packed weight matrices (`dm_format`)."""

    F32 = 0
    BF16 = 1
    Q8 = 2
    Q4 = 3

    @property
    def label(self) -> str:
        """The name that users and manifests write, such as "q4"."""
        return self.name.lower()

    @property
    def quantized(self) -> bool:
        """Whether the weights are integers with scales, and are multiplied with a quantized operand."""
        return self >= WeightFormat.Q8

    @classmethod
    def parse(cls, label: str) -> WeightFormat:
        """The format called `label`; raises UsageError that names the known ones."""
        return cls[_known(label, [format.label for format in cls], "weight format")]


@dataclass(frozen=True)
class MatrixFormat:
    """How one matrix is packed: its format, and the weights per scale (0: a whole row; f32 and bf16 have no scales)."""

    format: WeightFormat
    group: int

    @property
    def part(self) -> OperandParts:
        """What the matrix is multiplied with."""
        return OperandParts.INT8 if self.format.quantized else OperandParts.FLOATS


@dataclass(frozen=True)
class ChunkFormat:
    """How the matrices of an expert's chunks are packed (`dm_chunk_format`): gate and up alike, down in its own way."""

    gate_up: MatrixFormat
    down: MatrixFormat


def parts_read(formats: Iterable[MatrixFormat]) -> OperandParts:
    """What matrices of these formats read of the operand that they share."""
    parts = OperandParts(0)
    for matrix in set(formats):
        parts |= matrix.part
    return parts


class ScaleChoice(IntEnum):
    """How the scales of q8 and q4 weights are chosen (`DM_SCALES_...`): by the largest weight, or of least error."""

    ABSMAX = 0
    MSE = 1

    @property
    def label(self) -> str:
        """The name that users and manifests write, such as "mse"."""
        return self.name.lower()

    @classmethod
    def parse(cls, label: str) -> ScaleChoice:
        """The choice called `label`; raises UsageError that names the known ones."""
        return cls[_known(label, [choice.label for choice in cls], "choice of scales")]


class KvFormat(IntEnum):
    """Formats of the key/value cache (`dm_kv_format`)."""

    F32 = 0
    F16 = 1
    Q8 = 2

    @property
    def label(self) -> str:
        """The name that users write, such as "f16"."""
        return self.name.lower()

    @classmethod
    def parse(cls, label: str) -> KvFormat:
        """The format called `label`; raises UsageError that names the known ones."""
        return cls[_known(label, [format.label for format in cls], "KV cache format")]


def _known(label: str, labels: list[str], what: str) -> str:
    if label not in labels:
        raise UsageError(f"unknown {what} {label!r}; choose one of {', '.join(labels)}")
    return label.upper()


def packed_bytes(fmt: WeightFormat, rows: int, columns: int, group: int) -> int:
    """Bytes of a packed matrix [rows, columns], a multiple of 64 (`dm_packed_bytes`).

    Args:
        fmt: The format of the weights.
        rows: Rows, padded to whole tiles of 16.
        columns: Columns; q8 and q4 pad them to a multiple of 32.
        group: Weights per scale, 0 for one scale per row; f32 and bf16 ignore it.
    """
    tiles = -(-rows // TILE_ROWS)
    if not fmt.quantized:
        value_bytes = 4 if fmt == WeightFormat.F32 else 2
        return tiles * round_up(columns * TILE_ROWS * value_bytes, ALIGNMENT)
    groups = -(-columns // group) if group else 1
    scale_bytes = round_up(groups * TILE_ROWS * 2, ALIGNMENT)
    vectors = 8 if fmt == WeightFormat.Q8 else 4
    return tiles * (scale_bytes + -(-columns // GROUP) * vectors * 64)


def chunk_bytes(fmt: ChunkFormat, model_dim: int, width: int) -> int:
    """Bytes of one expert chunk: gate [width, D], up [width, D], down [D, width], back to back (`dm_chunk_bytes`)."""
    gate_up, down = fmt.gate_up, fmt.down
    rows_bytes = packed_bytes(gate_up.format, width, model_dim, gate_up.group)
    return 2 * rows_bytes + packed_bytes(down.format, model_dim, width, down.group)


def kv_block_bytes(fmt: KvFormat, head_dim: int) -> int:
    """Bytes of 64 positions of one KV head of one layer: K, then V; a multiple of 64 (`dm_kv_block_bytes`)."""
    if fmt != KvFormat.Q8:
        return 2 * BLOCK_POSITIONS * head_dim * (4 if fmt == KvFormat.F32 else 2)
    groups = -(-head_dim // GROUP)
    return 2 * BLOCK_POSITIONS * groups * (GROUP + 4)
