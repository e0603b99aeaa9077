"""What every part of the forward pass needs to know about this rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_moe.kernels import Kernels, WeightFormat
from dist_moe.model_config import ModelConfig
from dist_moe.parallel.plan import Plan
from dist_moe.store.reader import Store
from dist_moe.store.units import output_group


@dataclass(frozen=True)
class Share:
    """The model, this rank's part of it, and the kernels that compute it."""

    config: ModelConfig
    plan: Plan
    kernels: Kernels
    format: WeightFormat
    group_size: int
    output_group: int  # of o_proj's columns, which never cross a head
    router_format: WeightFormat
    kv_of_h: npt.NDArray[np.int32]  # the local KV head of each local query head

    @property
    def quantized(self) -> bool:
        """Whether matrices read int8 activations."""
        return self.format in (WeightFormat.Q8, WeightFormat.Q4)


def make_share(store: Store, plan: Plan, kernels: Kernels) -> Share:
    """This rank's share of an open store."""
    config, manifest = store.config, store.manifest
    first_kv_head = plan.kv_heads.start
    kv_of_h = [head // config.heads_per_kv_head - first_kv_head for head in plan.heads]
    return Share(
        config=config,
        plan=plan,
        kernels=kernels,
        format=manifest.format,
        group_size=manifest.group_size,
        output_group=output_group(config, manifest.group_size),
        router_format=manifest.router_format,
        kv_of_h=np.array(kv_of_h, dtype=np.int32),
    )
