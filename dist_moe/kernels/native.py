"""One typed method per C function of dist_moe.h: outputs first, sizes taken from the arrays, every array checked.

Per-token arrays may be longer than the step: only the first `tokens` rows are read and written. Where a method takes
`tokens=None`, it means all rows of the array named in its docstring. Checks raise TypeError, ValueError or BufferError:
all are our own bugs. `fault_T` (int32 [T]) keeps the lowest `layer << 8 | kind` of each token (NUMERICS rule 15).
"""

from __future__ import annotations

from dist_moe.kernels.attention_kernels import AttentionKernels
from dist_moe.kernels.expert_kernels import ExpertKernels
from dist_moe.kernels.machine_kernels import MachineKernels
from dist_moe.kernels.matrix_kernels import MatrixKernels
from dist_moe.kernels.pack_kernels import PackKernels
from dist_moe.kernels.pick_kernels import PickKernels
from dist_moe.kernels.sampling_kernels import SamplingKernels
from dist_moe.kernels.token_kernels import TokenKernels


class Kernels(
    MatrixKernels,
    PackKernels,
    AttentionKernels,
    ExpertKernels,
    TokenKernels,
    PickKernels,
    SamplingKernels,
    MachineKernels,
):
    """All kernels on one context: an ISA level and a thread pool; used from one thread at a time."""
