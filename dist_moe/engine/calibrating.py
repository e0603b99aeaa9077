"""Steps that are watched by all ranks: what their matrices read becomes a calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dist_moe.engine.calibration import Sums
from dist_moe.engine.runtime import Runtime
from dist_moe.store.calibration import Calibration


def calibrate(engine: Runtime, pieces: Sequence[Sequence[int]], interrupted: Callable[[], bool]) -> Calibration:
    """Read token sequences, each from its begin, and add up what the matrices read; on rank 0 alone.

    Steps may not be partitioned by tokens (exchange allreduce). The texts' names are left to be filled in.

    Raises:
        Interrupted, UsageError, DistMoeError, AgreedError: As `Runtime.logits`.
    """
    engine.crew.begin_calibration()
    for piece in pieces:
        engine.logits(piece, None, interrupted)
    sums: Sums = engine.crew.end_calibration()
    manifest = engine.model.weights.store.manifest
    tokens = sum(len(piece) for piece in pieces)
    return Calibration(manifest.source_name, manifest.source_fingerprint, (), tokens, *sums)
