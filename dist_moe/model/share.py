"""What every part of the forward pass needs to know about this rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dist_moe.kernels import LayerSizes, OperandParts, WeightFormat, Workers
from dist_moe.model_config import ModelConfig
from dist_moe.parallel.plan import CHUNK_READ_COST_TOKENS, JobPlan, Plan
from dist_moe.store.reader import Store


@dataclass(frozen=True)
class Share:
    """The model, this rank's part of it, and what the kernels of a layer need to know of both."""

    config: ModelConfig
    job: JobPlan
    plan: Plan
    format: WeightFormat  # of most weights
    quantized: bool  # whether any matrix of the model reads int8 activations
    head_parts: OperandParts  # what lm_head reads of its operand
    sizes: LayerSizes


def make_share(store: Store, job: JobPlan, rank: int) -> Share:
    """One rank's share of an open store."""
    config, manifest, plan = store.config, store.manifest, job.plans[rank]
    kv_of_h = [plan.kv_heads.index(head // config.heads_per_kv_head) for head in plan.heads]
    sizes = LayerSizes(
        model_dim=config.model_dim,
        heads=len(plan.heads),
        kv_heads=len(plan.kv_heads),
        head_dim=config.head_dim,
        experts_per_token=config.experts_per_token,
        workers=Workers(plan.node, plan.local_rank, plan.local_ranks, CHUNK_READ_COST_TOKENS, job.speeds),
        norm_topk_prob=config.norm_topk_prob,
        eps=config.eps,
        score_scale=config.score_scale,
        kv_of_h=np.array(kv_of_h, dtype=np.int32),
    )
    head_parts = manifest.matrix_format("lm_head", 0).part
    return Share(config, job, plan, manifest.format, manifest.formats.quantized, head_parts, sizes)
