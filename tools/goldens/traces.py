"""Logits and greedy traces, chosen so that rounding cannot change a decision.

B sequences, T tokens, S generated tokens, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from goldens.build import load, logits_of, seed_of

STEPS = 64
CANDIDATES = 768
PROMPT_TOKENS = 11
LEAST_DISTINCT = 16


@contextmanager
def router_gaps(model: PreTrainedModel, sequences: int) -> Iterator[list[torch.Tensor]]:
    """Collects, per router call, each sequence's smallest gap between the last chosen and the first refused expert.

    Gaps are relative to the largest router logit; a call that chooses every expert has none.
    """
    gaps: list[torch.Tensor] = []

    def collect(router: Qwen3MoeTopKRouter, _inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
        ranked = outputs[0].reshape(sequences, -1, router.num_experts).sort(descending=True).values
        if router.top_k < router.num_experts:
            gap = ranked[..., router.top_k - 1] - ranked[..., router.top_k]
            gaps.append(gap.amin(1) / ranked.abs().max())

    hooks = [m.register_forward_hook(collect) for m in model.modules() if isinstance(m, Qwen3MoeTopKRouter)]
    try:
        yield gaps
    finally:
        for hook in hooks:
            hook.remove()


def smallest(gaps: list[torch.Tensor], sequences: int) -> torch.Tensor:
    """The smallest gap of each sequence; 1 where there is no router."""
    return torch.stack(gaps).amin(0) if gaps else torch.ones(sequences)


def generate(model: PreTrainedModel, prompts_BT: torch.Tensor) -> torch.Tensor:
    """The greedy continuation [B, S] of prompts of equal length, with transformers' cache."""
    cache, step, chosen = None, prompts_BT, []
    with torch.no_grad():
        for _ in range(STEPS):
            out = model(step, past_key_values=cache, use_cache=True)
            cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            chosen.append(step)
    return torch.cat(chosen, 1)


def margins_of(model: PreTrainedModel, prompts_BT: torch.Tensor, greedy_BS: torch.Tensor) -> torch.Tensor:
    """Top-2 margins [B, S] of a greedy trace, relative to the sequence's largest |logit|.

    Computed from the whole sequence at once, without a cache; a step whose best token is not the trace's is -1.
    """
    logits = logits_of(model, torch.cat([prompts_BT, greedy_BS], 1))
    rows = logits[:, prompts_BT.shape[1] - 1 : -1]
    top = rows.topk(2, dim=-1)
    margins = (top.values[..., 0] - top.values[..., 1]) / logits.abs().amax((1, 2))[:, None]
    return margins.where(top.indices[..., 0] == greedy_BS, torch.tensor(-1.0))


def farthest(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """The sequence [T], of several, whose routing is farthest from a tie; the first if there is no router."""
    with router_gaps(model, len(ids_BT)) as gaps:
        logits_of(model, ids_BT)
    return ids_BT[int(smallest(gaps, len(ids_BT)).argmax())]


def pick_prompt(model: PreTrainedModel, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The random prompt, of several, whose greedy trace is farthest from any tie, with that trace."""
    prompts = torch.randint(model.config.vocab_size, (CANDIDATES, PROMPT_TOKENS), generator=generator)
    greedy = generate(model, prompts)
    with router_gaps(model, len(prompts)) as gaps:
        scores = margins_of(model, prompts, greedy).amin(1)
    scores = torch.minimum(scores, smallest(gaps, len(prompts)))
    distinct = torch.tensor([len(set(row.tolist())) for row in greedy])
    best = int(scores.where(distinct >= min(LEAST_DISTINCT, int(distinct.max())), torch.tensor(-1.0)).argmax())
    return prompts[best], greedy[best]


def golden_arrays(
    model: PreTrainedModel, ids_T: torch.Tensor, prompt_T: torch.Tensor, greedy_S: torch.Tensor
) -> dict[str, Any]:
    """What a golden.npz holds, for ids and a greedy trace that were chosen before."""
    with router_gaps(model, 1) as ids_gaps:
        logits = logits_of(model, ids_T[None])[0]
    with router_gaps(model, 1) as greedy_gaps:
        margins = margins_of(model, prompt_T[None], greedy_S[None])[0]
    return {
        "ids": ids_T.numpy().astype(np.int32),
        "logits": logits.numpy(),
        "prompt_ids": prompt_T.numpy().astype(np.int32),
        "greedy_ids": greedy_S.numpy().astype(np.int32),
        "margins": margins.numpy(),
        "min_margin": np.float32(margins.min()),
        "ids_router_gap": np.float32(smallest(ids_gaps, 1)[0]),
        "greedy_router_gap": np.float32(smallest(greedy_gaps, 1)[0]),
    }


def write_golden(directory: Path, tokens: int) -> dict[str, Any]:
    """Writes golden.npz beside a checkpoint, from the checkpoint as it stands on disk."""
    model = load(directory)
    generator = torch.Generator().manual_seed(seed_of(directory.name + " ids"))
    ids = farthest(model, torch.randint(model.config.vocab_size, (CANDIDATES // 4, tokens), generator=generator))
    prompt, greedy = pick_prompt(model, generator)
    arrays = golden_arrays(model, ids, prompt, greedy)
    np.savez_compressed(directory / "golden.npz", **arrays)
    return arrays
