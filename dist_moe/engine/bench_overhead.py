"""What a step costs beside its work: steps of a model with as many layers, heads and experts, but next to no numbers.

Python, calls into C, waking threads and messages are those of the real model; a matrix has 32 columns, an expert 32
hidden units, the vocabulary 1024 rows. The little work that is left is counted as overhead, too: an upper bound.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from dist_moe.engine.crew import Crew
from dist_moe.engine.request import SamplingOptions
from dist_moe.engine.sampling import draw_token
from dist_moe.engine.worker import Worker
from dist_moe.kernels import KvFormat
from dist_moe.model.step import Slice, Step
from dist_moe.model.transformer import Transformer
from dist_moe.model_config import ModelConfig
from dist_moe.parallel.plan import make_plan
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store
from dist_moe.store.synthetic import SyntheticModel, write_synthetic

_SMALL = 32
_VOCABULARY = 1024
_WARM_UP_STEPS = 4
_STEP_TOKENS = 16


def overhead_seconds(model: Transformer, kv_format: KvFormat, steps: int) -> float:
    """Median seconds of a decode step of the small model; collective, the figure is rank 0's, 0 elsewhere."""
    exchange = model.exchange
    with tempfile.TemporaryDirectory(prefix="dist-moe-bench-") as directory:
        store = _small_store(model, Path(directory))
        world, config = exchange.world, store.config
        plan = make_plan(
            heads=config.heads,
            heads_per_kv_head=config.heads_per_kv_head,
            vocabulary=config.vocabulary,
            rank=world.rank,
            ranks=world.size,
            layout=model.share.plan.layout,
        )
        small = Transformer(store, plan, exchange, model.kernels, kv_format, _STEP_TOKENS)
        crew = Crew(Worker(small, exchange, world.size), exchange, _STEP_TOKENS)
        if not world.is_leader:
            crew.follow()
            return 0.0
        seconds = [_decode(small, crew, position) for position in range(_WARM_UP_STEPS + steps)]
        crew.stop()
        return median(seconds[_WARM_UP_STEPS:])


def _decode(model: Transformer, crew: Crew, position: int) -> float:
    """Seconds of one step of one token, from its words to the token drawn."""
    started_s = time.perf_counter()
    part = Slice(0, position, (position % _VOCABULARY,))
    result = crew.run(Step((part,), (0,), (0.0,), False, _VOCABULARY))
    draw_token(
        model.kernels,
        SamplingOptions(),
        position,
        result.candidates[0],
        lambda: crew.fetch_row(0),
        _VOCABULARY,
    )
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
