"""The hidden units of experts, computed once more from their packed gate and up: the forward pass does not keep them.

Shape suffixes: N tokens of one expert, D model dim, F hidden units, w chunk width, R ranks, C chunks of a layer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import MatrixList, Operand, aligned_empty
from dist_moe.model.transformer import Transformer
from dist_moe.parallel.plan import JobPlan
from dist_moe.store.unit_parts import unit_parts

Floats = npt.NDArray[np.float32]


class HiddenUnits:
    """One rank's share of all hidden units: those of chunks that its node holds, each on one rank alone."""

    def __init__(self, model: Transformer) -> None:
        """Divide the chunks; nothing is computed yet."""
        self._model = model
        manifest, config = model.weights.store.manifest, model.config
        self._widths = [manifest.layer_chunk_width(layer) for layer in range(config.layers)]
        self._owners = [
            chunk_readers(model.share.job, layer, manifest.layer_chunks_per_expert(layer))
            for layer in range(config.layers)
        ]
        self._operand = Operand(1, config.model_dim, model.share.quantized)
        self._fault_N = np.zeros(1, np.int32)

    def columns(self, layer: int, expert: int) -> npt.NDArray[np.int64] | None:
        """Which hidden units of an expert are this rank's, ascending; None for none."""
        chunks, width = self._chunks(layer, expert), self._widths[layer]
        if not chunks:
            return None
        columns = np.concatenate([np.arange(chunk * width, (chunk + 1) * width) for chunk in chunks])
        return columns[columns < self._model.config.layer_hidden(layer)]

    def of(self, layer: int, expert: int, rows_ND: Floats) -> npt.NDArray[np.float64]:
        """This rank's hidden units of an expert for some tokens.

        Args:
            layer: The layer.
            expert: The expert; some of its chunks are this rank's.
            rows_ND: What its gate and up read.

        Returns:
            float64 [N, columns], in the order of `columns`.
        """
        chunks, width, columns = self._chunks(layer, expert), self._widths[layer], self.columns(layer, expert)
        assert columns is not None
        matrices = self._gate_and_up(layer, expert, chunks)
        out_NR: Floats = aligned_empty((len(rows_ND), 2 * width * len(chunks)), np.float32)
        self._multiply(out_NR, matrices, rows_ND, layer)
        gate_NF, up_NF = np.split(out_NR.astype(np.float64), 2, axis=1)
        with np.errstate(over="ignore"):  # silu of very negative gates is 0
            hidden_NF = gate_NF / (1 + np.exp(-gate_NF)) * up_NF
        return np.ascontiguousarray(hidden_NF[:, : len(columns)])

    def _chunks(self, layer: int, expert: int) -> list[int]:
        """This rank's chunks of an expert, counted within it."""
        owner_C = self._owners[layer]
        per_expert = len(owner_C) // self._model.config.layer_experts(layer)
        own = owner_C[expert * per_expert : (expert + 1) * per_expert] == self._model.share.plan.rank
        chunks: list[int] = np.flatnonzero(own).tolist()
        return chunks

    def _gate_and_up(self, layer: int, expert: int, chunks: list[int]) -> MatrixList:
        """All gates side by side, then all ups."""
        store, width = self._model.weights.store, self._widths[layer]
        first = expert * store.manifest.layer_chunks_per_expert(layer)
        gate, up, _ = unit_parts(store.manifest, "chunk", layer, first)
        entries = []
        for half, part in enumerate((gate, up)):
            for place, chunk in enumerate(chunks):
                unit = store.unit("chunk", layer, first + chunk)
                column = (half * len(chunks) + place) * width
                entries.append((unit[part.bytes], width, column, part.format))
        return MatrixList(entries)

    def _multiply(self, out_NR: Floats, matrices: MatrixList, rows_ND: Floats, layer: int) -> None:
        kernels, N = self._model.kernels, len(rows_ND)
        if self._operand.max_tokens < N:
            self._operand = Operand(2 * N, self._operand.columns, self._operand.quantized)
            self._fault_N = np.zeros(2 * N, np.int32)
        self._operand.x_TC[:N] = rows_ND
        kernels.quantize(self._operand, self._fault_N, N, layer)
        kernels.matmul(out_NR, matrices, self._operand, N)


def chunk_readers(job: JobPlan, layer: int, chunks_per_expert: int) -> npt.NDArray[np.int64]:
    """The rank that recomputes each chunk of a layer: one of those whose node holds it, by turns of experts; int64 [C].

    Padding of the last chunk is beyond the layer's hidden units and only ever at the end of an expert.
    """
    held_RC = job.holds(layer)[list(job.node_of_rank)]
    turn_C = np.arange(held_RC.shape[1]) // chunks_per_expert % held_RC.sum(axis=0)
    readers_C: npt.NDArray[np.int64] = np.argmax(np.cumsum(held_RC, axis=0) == turn_C + 1, axis=0)
    return readers_C
