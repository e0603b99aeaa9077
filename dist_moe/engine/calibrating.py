"""Steps that are watched by all ranks: what their matrices read becomes a calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dist_moe.engine.perplexity import divergences
from dist_moe.engine.runtime import Runtime
from dist_moe.engine.steps.worker import RowSink
from dist_moe.store.calibration import Calibration, group_count

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Pieces = Sequence[Sequence[int]]
OnDone = Callable[[int, int], None]


def calibrate(
    engine: Runtime, pieces: Pieces, interrupted: Callable[[], bool], on_tokens: OnDone = lambda done, total: None
) -> Calibration:
    """Read token sequences, each from its begin, and add up what the matrices read; on rank 0 alone.

    Args:
        engine: Whose steps are not partitioned by tokens (exchange allreduce).
        pieces: The sequences; their texts' names are left to be filled in.
        interrupted: As of `Runtime.logits`.
        on_tokens: Told (tokens read, tokens in all) after each piece.

    Raises:
        Interrupted, UsageError, DistMoeError, AgreedError: As `Runtime.logits`.
    """
    engine.crew.begin_calibration()
    done, tokens = 0, sum(len(piece) for piece in pieces)
    for piece in pieces:
        engine.logits(piece, None, interrupted)
        done += len(piece)
        on_tokens(done, tokens)
    sums = engine.crew.end_calibration()
    manifest = engine.model.weights.store.manifest
    unmeasured_G = np.zeros(group_count(engine.config.layers))
    return Calibration(manifest.source_name, manifest.source_fingerprint, (), tokens, *sums, unmeasured_G)


def measure_sensitivity(
    engine: Runtime,
    calibration: Calibration,
    pieces: Pieces,
    interrupted: Callable[[], bool],
    on_group: OnDone,
) -> Calibration:
    """The calibration with sensitivities: the text is read once more for each group of matrices; on rank 0 alone.

    Args:
        engine: Of exact weights.
        calibration: Of the same model.
        pieces: Token sequences; the logits of all their positions are kept in memory.
        interrupted: As of `Runtime.logits`.
        on_group: Told (groups done, groups in all).

    Raises:
        Interrupted, UsageError, DistMoeError, AgreedError: As `Runtime.logits`.
    """
    base: list[Floats] = []
    _read(engine, pieces, lambda rows_NV: base.append(rows_NV.copy()), interrupted)
    sensitive_G = np.zeros(group_count(engine.config.layers))
    for group in range(len(sensitive_G)):
        engine.crew.round_weights(group)
        differences = _Differences(base)
        _read(engine, pieces, differences.take, interrupted)
        sensitive_G[group] = differences.sum()
        on_group(group + 1, len(sensitive_G))
    engine.crew.round_weights(-1)
    tokens = sum(len(piece) for piece in pieces)
    return replace(calibration, sensitive_G=sensitive_G, sensitive_tokens=tokens)


def _read(engine: Runtime, pieces: Pieces, sink: RowSink, interrupted: Callable[[], bool]) -> None:
    for piece in pieces:
        engine.logits(piece, sink, interrupted)


class _Differences:
    """Divergences of a second reading's rows from those of the first; every reading gives blocks of the same rows."""

    def __init__(self, base: list[Floats]) -> None:
        self._base = iter(base)
        self._found: list[Doubles] = []

    def take(self, rows_NV: Floats) -> None:
        self._found.append(divergences(rows_NV, next(self._base)))

    def sum(self) -> float:
        """Of all rows at once, so that it does not depend on the blocks."""
        return float(np.concatenate(self._found).sum())
