"""What rank 0 needs to give orders, for those who make steps of their own."""

from __future__ import annotations

from dataclasses import dataclass

from dist_moe.engine.requests.prefix_index import PrefixIndex
from dist_moe.engine.start.options import EngineOptions
from dist_moe.engine.steps.crew import Crew
from dist_moe.engine.watch.statistics import Clock
from dist_moe.kernels import Kernels
from dist_moe.model_config import ModelConfig


@dataclass(frozen=True)
class Leader:
    """The parts of a running model that rank 0 leads with."""

    crew: Crew
    kernels: Kernels
    prefixes: PrefixIndex
    clock: Clock
    options: EngineOptions
    config: ModelConfig
