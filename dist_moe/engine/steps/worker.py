"""What every rank does in a step; rank 0 gets the results."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.engine.calibration.calibration import Calibrator
from dist_moe.engine.calibration.rounding import Rounder
from dist_moe.engine.requests.candidates import CandidateExchange, Candidates, block_sums
from dist_moe.engine.steps.kv_transfer import KvTransfer
from dist_moe.engine.watch.health import Health
from dist_moe.engine.watch.scrub import Scrubber
from dist_moe.kernels import NO_FAULT
from dist_moe.model.step import MAX_LOGIT_ROWS, Step
from dist_moe.model.stopwatch import Part
from dist_moe.model.transformer import Transformer
from dist_moe.parallel.exchange import Exchange

Floats = npt.NDArray[np.float32]
RowSink = Callable[[Floats], None]


@dataclass(frozen=True)
class StepResult:
    """A step's outcome on rank 0: each token's lowest fault over all ranks, and one entry per logit row.

    Faults and candidates are valid until the next step.
    """

    fault_T: npt.NDArray[np.int32]
    candidates: list[Candidates]
    full_logits: list[Floats]


class Worker:
    """One rank's model and the collectives around it. Every method is collective: all ranks call it alike.

    Attributes:
        stopwatch, work_L2, node_speeds: The model's.
    """

    def __init__(self, model: Transformer, exchange: Exchange, scrubber: Scrubber | None = None) -> None:
        """Prepare the messages that carry logits.

        Args:
            model: This rank's part of the model.
            exchange: The collectives.
            scrubber: Re-checks mapped weights in idle time, on all ranks or on none.
        """
        self._model = model
        self.kv = KvTransfer(model, exchange)
        self.health = Health(model, exchange, scrubber)
        self.calibrator, self.rounder = Calibrator(model, exchange), Rounder(model)
        self._exchange = exchange
        self.stopwatch, self.work_L2 = model.stopwatch, model.work_L2
        self.node_speeds = model.share.job.speeds
        job, plan, config = model.share.job, model.share.plan, model.config
        self._candidates = CandidateExchange(exchange, model.kernels, job, plan.rank)
        self._vocabulary_counts = [other.vocabulary_rows for other in job.plans]
        self._column_of_V = job.vocabulary_columns()
        self._logits_NV: Floats | None = None
        if plan.rank == 0 and job.ranks > 1:
            self._logits_NV = np.empty((MAX_LOGIT_ROWS, config.vocabulary), dtype=np.float32)
        self._last_logits_Nv = np.empty((0, 0), dtype=np.float32)

    def run(self, step: Step, sink: RowSink | None = None) -> StepResult | None:
        """Run one step on all ranks.

        Args:
            step: What to compute, equal on all ranks.
            sink: On rank 0, gets the full logits of up to MAX_LOGIT_ROWS rows at a time, instead of the result.

        Returns:
            The outcome on rank 0, None elsewhere.

        Raises:
            AgreedError: A rank holds other numbers than the others, or found damaged weights.
        """
        model = self._model
        self.health.begin_step()
        model.run_layers(step)
        result = StepResult(model.fault_T, [], [])
        for first in range(0, len(step.logit_rows), MAX_LOGIT_ROWS):
            rows = slice(first, first + MAX_LOGIT_ROWS)
            self._run_rows(step, rows, result, sink)
        model.stopwatch.mark(Part.OTHER)
        self.health.end_step(model.fault_T)
        model.stopwatch.mark(Part.EXCHANGE)
        return result if model.share.plan.rank == 0 else None

    def fetch_row(self, row: int) -> Floats | None:
        """The whole logits of one row of the last step, on rank 0."""
        return self._gather_full(self._last_logits_Nv[row : row + 1])

    def _run_rows(self, step: Step, rows: slice, result: StepResult, sink: RowSink | None) -> None:
        tokens = step.logit_rows[rows]
        logits_Nv = self._last_logits_Nv = self._model.logits(tokens)
        fault_N = np.full(len(tokens), NO_FAULT, dtype=np.int32)
        layer = self._model.config.layers
        if step.temperatures:
            found = self._candidates.gather(
                logits_Nv, step.temperatures[rows], step.valid_vocabulary, fault_N, layer, step.unit_sums
            )
            more = rows.stop < len(step.logit_rows)  # the next call overwrites what was found
            result.candidates.extend(deepcopy(found or []) if more else found or [])
        else:
            everything = logits_Nv.shape[1]
            block_sums(self._model.kernels, logits_Nv, (1.0,) * len(tokens), everything, fault_N, layer)
        self._model.add_faults(tokens, fault_N)
        self._model.stopwatch.mark(Part.SAMPLING)
        if not step.full_logits:
            return
        full_NV = self._gather_full(logits_Nv)
        self._model.stopwatch.mark(Part.EXCHANGE)
        if full_NV is None:
            return
        if sink is not None:
            sink(full_NV)
        else:
            result.full_logits.extend(full_NV.copy())

    def _gather_full(self, logits_Nv: Floats) -> Floats | None:
        out_NV = None if self._logits_NV is None else self._logits_NV[: len(logits_Nv)]
        found_NV = self._exchange.gather_columns(logits_Nv, self._vocabulary_counts, out_NV)
        if found_NV is None or self._column_of_V is None:
            return found_NV
        return np.take(found_NV, self._column_of_V, axis=1)
