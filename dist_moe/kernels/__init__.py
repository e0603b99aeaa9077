"""The compiled kernels behind typed wrappers; the only package that touches the C extension."""

from dist_moe.kernels.arrays import address_of, aligned_empty
from dist_moe.kernels.buffers import CHUNK_WORDS, ChunkFormats, ChunkList, KvView, MatrixList, Operand
from dist_moe.kernels.context import isa_levels
from dist_moe.kernels.formats import (
    ALIGNMENT,
    BLOCK_POSITIONS,
    GROUP,
    NO_FAULT,
    TILE_ROWS,
    VOCABULARY_BLOCK,
    ChunkFormat,
    FaultKind,
    KvFormat,
    MatrixFormat,
    OperandParts,
    ScaleChoice,
    WeightFormat,
    chunk_bytes,
    kv_block_bytes,
    packed_bytes,
    parts_read,
)
from dist_moe.kernels.hashing import hash_floats
from dist_moe.kernels.layer_kernels import AttentionLayer, ExpertsLayer, LayerBuffers, LayerSizes
from dist_moe.kernels.mapped_files import (
    MappedFile,
    MappedTensor,
    catch_bus_errors,
    describe_address,
    linger_after_crash,
)
from dist_moe.kernels.native import Kernels
from dist_moe.kernels.node import NODE_RANK_BYTES, NodeMemory
from dist_moe.kernels.pack_kernels import PackMatrix
from dist_moe.kernels.paging import is_absent, populate
from dist_moe.kernels.pick_kernels import WorkModel
from dist_moe.kernels.picks import LARGEST_SPEED, ChunkHolders, Picks, Workers
from dist_moe.kernels.sampling_kernels import Penalties, SamplingParameters
from dist_moe.kernels.sums_wire import SumsCodec, WireFormat
from dist_moe.kernels.token_kernels import OperandRows, RoutingRows, SumRows

__all__ = [
    "ALIGNMENT",
    "BLOCK_POSITIONS",
    "CHUNK_WORDS",
    "GROUP",
    "LARGEST_SPEED",
    "NODE_RANK_BYTES",
    "NO_FAULT",
    "TILE_ROWS",
    "VOCABULARY_BLOCK",
    "AttentionLayer",
    "ChunkFormat",
    "ChunkFormats",
    "ChunkHolders",
    "ChunkList",
    "ExpertsLayer",
    "FaultKind",
    "Kernels",
    "KvFormat",
    "KvView",
    "LayerBuffers",
    "LayerSizes",
    "MappedFile",
    "MappedTensor",
    "MatrixFormat",
    "MatrixList",
    "NodeMemory",
    "Operand",
    "OperandParts",
    "OperandRows",
    "PackMatrix",
    "Penalties",
    "Picks",
    "RoutingRows",
    "SamplingParameters",
    "ScaleChoice",
    "SumRows",
    "SumsCodec",
    "WeightFormat",
    "WireFormat",
    "WorkModel",
    "Workers",
    "address_of",
    "aligned_empty",
    "catch_bus_errors",
    "chunk_bytes",
    "describe_address",
    "hash_floats",
    "is_absent",
    "isa_levels",
    "kv_block_bytes",
    "linger_after_crash",
    "packed_bytes",
    "parts_read",
    "populate",
]
