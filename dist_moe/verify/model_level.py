"""A whole model's logits: against float64 and its source, and the bits of every way to compute them on any ranks.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dist_moe.engine.steps.worker import Worker
from dist_moe.errors import StoreError
from dist_moe.kernels import NO_FAULT, Kernels, KvFormat
from dist_moe.kernels.arrays import F32Array, F64Array
from dist_moe.model.step import Slice, Step
from dist_moe.model.transformer import Transformer
from dist_moe.parallel.exchange import Exchange
from dist_moe.parallel.plan import EXPERT_LAYOUTS, plan_job
from dist_moe.store.reader import Store
from dist_moe.verify import definition
from dist_moe.verify.check import Check, close, describe_settings, folded, rms_deviation
from dist_moe.verify.definition import Weights
from dist_moe.verify.layer_levels import FLOAT64, SOURCE, whole_layer
from dist_moe.verify.parts import Parts, Routed
from dist_moe.verify.subject import MODEL_TOLERANCE, SOURCE_MODEL_FACTOR, Subject

_CHUNKS = (7, 1 << 20)
_SEQUENCE = 3


@dataclass(frozen=True)
class Way:
    """One way to compute the same logits."""

    layout: str = "shared"
    kv: KvFormat = KvFormat.F16
    chunk: int = 1 << 20
    partitioned: bool = False

    @property
    def name(self) -> str:
        """For people, and the key of its hash."""
        steps = f"{self.chunk} tokens a step" if self.chunk < 1 << 20 else "one step"
        return f"{self.layout}, {steps}, {self.kv.label} cache{', by tokens' if self.partitioned else ''}"


def ways() -> list[Way]:
    """Every layout in one step and in several; partitioned by tokens; every format of the cache."""
    found = [Way(layout, chunk=chunk) for layout, chunk in itertools.product(EXPERT_LAYOUTS, _CHUNKS)]
    found += [Way(partitioned=True)]
    return found + [Way(kv=kv) for kv in KvFormat if kv != KvFormat.F16]


def model_logits(store: Store, kernels: Kernels, exchange: Exchange, ids: Sequence[int], way: Way) -> F32Array | None:
    """The logits [T, V] at every position, on rank 0; None elsewhere. Collective.

    Raises:
        StoreError: The model's numbers overflow.
    """
    world = exchange.world
    job = plan_job(store.config, store.manifest.group_size, way.layout, node_of_rank=world.node_of_rank)
    chunk = min(way.chunk, len(ids))
    worker = Worker(Transformer(store, job, exchange, kernels, way.kv, chunk), exchange)
    rows: list[F32Array] = []
    for first in range(0, len(ids), chunk):
        part = tuple(ids[first : first + chunk])
        step = Step((Slice(_SEQUENCE, first, part),), tuple(range(len(part))), (), True, store.config.vocabulary)
        result = worker.run(
            replace(step, partitioned=way.partitioned), lambda rows_NV: rows.append(np.array(rows_NV, np.float32))
        )
        if result is not None and (result.fault_T != NO_FAULT).any():
            raise StoreError("the model's numbers overflow, so there is nothing to compare: examine its weights")
    return np.concatenate(rows) if rows else None


def hash_of(logits_TV: F32Array) -> str:
    """Of the bits."""
    return hashlib.sha256(np.ascontiguousarray(logits_TV).tobytes()).hexdigest()


def value_checks(subject: Subject, parts: Parts, logits_TV: F32Array) -> Iterator[Check]:
    """The logits of a float32 cache against float64 throughout, with the experts that the kernels chose."""
    choices, x_TD = [], parts.embed()
    for layer in range(subject.config.layers):
        x_TD, routed = parts.after_experts(layer, parts.after_attention(layer, x_TD))
        choices.append(routed)
    formats = subject.all_formats()
    quantized = any(fmt.quantized for fmt in formats)
    expected_TV = forward(subject.weights, subject.ids, choices)
    yield close("model", "logits, f32 cache", FLOAT64, logits_TV, expected_TV, MODEL_TOLERANCE[quantized])
    if subject.source is not None:
        deviation = rms_deviation(logits_TV, forward(subject.source, subject.ids, choices))
        tolerance = SOURCE_MODEL_FACTOR * subject.source_tolerance(formats)
        yield Check("model", "logits, f32 cache", SOURCE, deviation, tolerance)


def forward(weights: Weights, ids: Sequence[int], choices: Sequence[Routed]) -> F64Array:
    """The logits [T, V] in float64."""
    x_TD = definition.embed(weights, ids)
    for layer, routed in enumerate(choices):
        x_TD = whole_layer(weights, layer, x_TD, routed)
    return definition.logits(weights, x_TD)


def bits_checks(subject: Subject, exchange: Exchange, settings: Sequence[tuple[str, int]]) -> Iterator[Check]:
    """One rank: every way at the best level against one step, and one step at every other level."""
    by_cache: dict[KvFormat, str] = {}
    with Kernels(threads=1) as kernels:
        for way in sorted(ways(), key=lambda way: way != Way(kv=way.kv)):
            found = _hash(subject, kernels, exchange, way)
            if way == Way(kv=way.kv):
                by_cache[way.kv] = found
            else:
                yield Check("model", f"logits, {way.name}", "one step", float(found != by_cache[way.kv]), None)
    checks = []
    for isa, threads in settings:
        with Kernels(threads=threads, isa=isa) as kernels:
            different = float(_hash(subject, kernels, exchange, Way()) != by_cache[KvFormat.F16])
        what = f"logits, {isa}, {threads} thread{'s' if threads > 1 else ''}"
        checks.append(Check("model", what, "best level", different, None))
    yield from folded(f"logits, {describe_settings(settings)}", checks)


def _hash(subject: Subject, kernels: Kernels, exchange: Exchange, way: Way) -> str:
    logits_TV = model_logits(subject.store, kernels, exchange, subject.ids, way)
    assert logits_TV is not None
    return hash_of(logits_TV)
