"""What a step costs beside its kernels: Python, the way into C, messages between ranks.

Measured on a model with as many layers, heads and experts as the real one but next to no numbers (a matrix has 32
columns, an expert 32 hidden units, the vocabulary 1024 rows), so that the kernels' time, which is taken away, is short.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dist_moe.engine.requests.request import Completion, Request
from dist_moe.engine.requests.sampling import Sampler
from dist_moe.engine.steps.crew import Crew
from dist_moe.engine.steps.worker import Worker
from dist_moe.kernels import Kernels, KvFormat
from dist_moe.model.step import Slice, Step
from dist_moe.model.transformer import Transformer
from dist_moe.model_config import ModelConfig
from dist_moe.parallel.plan import plan_job
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from dist_moe.store.synthetic import SyntheticModel, write_synthetic

_SMALL = 32
_VOCABULARY = 1024
_WARM_UP_STEPS = 4
_STEP_TOKENS = 16
_EXCHANGE = "dm_node"


def overhead_seconds(model: Transformer, kv_format: KvFormat, steps: int) -> float:
    """Median seconds of a decode step of the small model less its kernels' time; collective.

    Steps as they are and steps whose calls into C are timed take turns. Exchanges count as overhead, with all waiting.

    Returns:
        Rank 0's figure; 0 elsewhere.
    """
    exchange = model.exchange
    directory_of_store = tempfile.TemporaryDirectory(prefix="dist-moe-bench-")
    # One thread: that others wake late is in the kernels' time, and would be noise here.
    with directory_of_store as directory, Kernels(1, model.kernels.isa) as kernels:
        store = _small_store(model, Path(directory))
        world, config = exchange.world, store.config
        layout, group_size = model.share.job.layout, store.manifest.group_size
        job = plan_job(config, group_size, layout, node_of_rank=world.node_of_rank)
        small = Transformer(store, job, exchange, kernels, kv_format, _STEP_TOKENS)
        crew = Crew(Worker(small, exchange), exchange, _STEP_TOKENS)
        if not world.is_leader:
            crew.follow()
            return 0.0
        whole_s, kernels_s = [], []
        for position in range(0, 2 * (_WARM_UP_STEPS + steps), 2):
            whole_s.append(_decode(small, crew, position))
            with KernelClock() as clock:
                _decode(small, crew, position + 1)
            kernels_s.append(clock.seconds)
        crew.stop()
        return max(0.0, median(whole_s[_WARM_UP_STEPS:]) - median(kernels_s[_WARM_UP_STEPS:]))


class KernelClock:
    """Sums the seconds inside the C extension's functions, but for exchanges, by the interpreter's profiling hook."""

    def __init__(self) -> None:
        """Start at 0."""
        self.seconds = 0.0
        self._called_s = 0.0
        self._before: Any = None

    def __enter__(self) -> KernelClock:
        """Begin to count, on this thread."""
        self._before = sys.getprofile()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Put back what was there."""
        sys.setprofile(self._before)

    def _note(self, _: object, event: str, function: Any) -> None:
        if event == "c_call":
            self._called_s = time.perf_counter()
        elif (
            event == "c_return" and function.__name__.startswith("dm_") and not function.__name__.startswith(_EXCHANGE)
        ):
            self.seconds += time.perf_counter() - self._called_s


def _decode(model: Transformer, crew: Crew, position: int) -> float:
    """Seconds of one step of one token, from its words to the token drawn."""
    started_s = time.perf_counter()
    part = Slice(0, position, (position % _VOCABULARY,))
    result = crew.run(Step((part,), (0,), (0.0,), False, _VOCABULARY))
    sampler = Sampler(Request((0,), 1))
    sampler.draw(model.kernels, Completion(), result.candidates[0], lambda: crew.fetch_row(0), _VOCABULARY)
    return time.perf_counter() - started_s


def _small_store(model: Transformer, directory: Path) -> Store:
    source = SyntheticModel(small_config(model.config), "overhead")
    options = StoreOptions(format=model.share.format, group_size=_SMALL, threads=1)
    write_synthetic(source, directory, options, lambda *_: None)
    return Store.open(directory)


def small_config(config: ModelConfig) -> ModelConfig:
    """The same layers, heads, experts and choices, with the smallest sizes that every format takes."""
    return replace(
        config,
        model_dim=_SMALL,
        head_dim=_SMALL,
        expert_hidden=min(config.expert_hidden, _SMALL),
        dense_hidden=min(config.dense_hidden, _SMALL),
        vocabulary=_VOCABULARY,
        score_scale=np.float32(_SMALL**-0.5),
        inv_freq=np.ones(_SMALL // 2, np.float32),
    )
