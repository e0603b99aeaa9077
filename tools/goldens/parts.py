"""Goldens of single modules, each from transformers' own class.

T tokens, D model dim, H query heads, G kv heads, P head dim, E experts, K experts per token, F expert hidden units.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen3_moe import modeling_qwen3_moe as hf

from goldens.build import fill, seed_of

Rotary = tuple[torch.Tensor, torch.Tensor]
TOKENS = 70
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 1,
    "vocab_size": 16,
    "norm_topk_prob": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


def config_of(**changes: Any) -> Qwen3MoeConfig:
    """The small config of all parts, eager everywhere."""
    config = Qwen3MoeConfig(**SIZES | changes)
    config._attn_implementation = config._experts_implementation = "eager"
    return config


def noise(name: str, *shape: int) -> torch.Tensor:
    """Normal noise that belongs to a name."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed_of(name)))


def save(golden: Path, name: str, **arrays: torch.Tensor | float | int) -> None:
    """Writes golden/name.npz: f32 tensors as they are, ids as int32, numbers as float64 or int64."""
    out: dict[str, Any] = {}
    for key, value in arrays.items():
        array = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        out[key] = array.astype(np.int32) if key.startswith("ids") else array
    np.savez_compressed(golden / f"{name}.npz", **out)


def mask_and_rope(config: Qwen3MoeConfig, x_BTD: torch.Tensor) -> tuple[torch.Tensor, Rotary]:
    """transformers' causal mask and (cos, sin) for positions 0 .. T-1."""
    positions = torch.arange(x_BTD.shape[1])[None]
    mask = create_causal_mask(
        config=config, inputs_embeds=x_BTD, attention_mask=None, past_key_values=None, position_ids=positions
    )
    return mask, hf.Qwen3MoeRotaryEmbedding(config)(x_BTD, positions)


def attention_weights(module: hf.Qwen3MoeAttention) -> dict[str, torch.Tensor]:
    """An attention's weights, with the head dimension split off, and its biases where it has them."""
    heads = (-1, module.head_dim)
    arrays: dict[str, torch.Tensor] = {"qnorm_P": module.q_norm.weight, "knorm_P": module.k_norm.weight}
    for letter, head in {"q": "H", "k": "G", "v": "G"}.items():
        linear: nn.Linear = getattr(module, f"{letter}_proj")
        arrays[f"w{letter}_{head}PD"] = linear.weight.unflatten(0, heads)
        if linear.bias is not None:
            arrays[f"b{letter}_{head}P"] = linear.bias.unflatten(0, heads)
    arrays["wo_DHP"] = module.o_proj.weight.unflatten(1, heads)
    if module.o_proj.bias is not None:
        arrays["bo_D"] = module.o_proj.bias
    return arrays


def block_weights(block: hf.Qwen3MoeSparseMoeBlock) -> dict[str, torch.Tensor]:
    """A MoE block's weights; gate is the first half of transformers' fused tensor."""
    gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
    return {"router_ED": block.gate.weight, "gate_EFD": gate, "up_EFD": up, "down_EDF": block.experts.down_proj}


def write_rmsnorm(golden: Path) -> None:
    """rmsnorm.npz: ordinary, large, tiny and zero rows, and per-head norms."""
    norm = hf.Qwen3MoeRMSNorm(80, eps=1e-6)
    norm.weight = nn.Parameter(1 + 0.2 * noise("rmsnorm weight", 80))
    x_TD = noise("rmsnorm", 8, 80) * torch.tensor([1, 3, 1e3, 1e-3, 1e-6, 0, 1e-2, 30.0])[:, None]
    head = hf.Qwen3MoeRMSNorm(48, eps=1e-5)
    head.weight = nn.Parameter(1 + 0.2 * noise("rmsnorm head weight", 48))
    x_THP = 2 * noise("rmsnorm head", 5, 3, 48)
    rows = {"x_TD": x_TD, "weight_D": norm.weight, "eps": 1e-6, "y_TD": norm(x_TD)}
    heads = {"x_THP": x_THP, "weight_P": head.weight, "head_eps": 1e-5, "y_THP": head(x_THP)}
    save(golden, "rmsnorm", **rows, **heads)


def write_attention(golden: Path) -> None:
    """attention.npz: the core on its own (q, k, v after rope) and a whole module with biases."""
    config = config_of(attention_bias=True)
    module = hf.Qwen3MoeAttention(config, 0).eval()
    fill(module, "attention")
    x = noise("attention x", 1, TOKENS, 48)
    mask, (cos, sin) = mask_and_rope(config, x)
    y, _ = module(x, (cos, sin), mask)
    heads = (1, TOKENS, -1, module.head_dim)
    q, k, v = (proj(x).view(heads).transpose(1, 2) for proj in (module.q_proj, module.k_proj, module.v_proj))
    q, k = hf.apply_rotary_pos_emb(module.q_norm(q), module.k_norm(k), cos, sin)
    out, _ = hf.eager_attention_forward(module, q, k, v, mask, module.scaling)
    core = {"q_THP": q[0].transpose(0, 1), "k_TGP": k[0].transpose(0, 1), "v_TGP": v[0].transpose(0, 1)}
    whole = {"x_TD": x[0], "cos_TP": cos[0], "sin_TP": sin[0], "y_TD": y[0]}
    save(golden, "attention", **core, o_THP=out[0], **whole, eps=config.rms_norm_eps, **attention_weights(module))


def write_routers(golden: Path) -> None:
    """router_true.npz and router_false.npz: one router with norm_topk_prob on and off."""
    for flag in (True, False):
        router = hf.Qwen3MoeTopKRouter(config_of(norm_topk_prob=flag, num_experts=11, num_experts_per_tok=4))
        fill(router, "router")
        x_TD = noise("router x", 33, 48)
        logits, weights, ids = router(x_TD)
        arrays = {"x_TD": x_TD, "router_ED": router.weight, "logits_TE": logits, "ids_TK": ids, "weights_TK": weights}
        save(golden, f"router_{str(flag).lower()}", **arrays)


def write_experts(golden: Path) -> None:
    """expert.npz (one expert of weight 1) and moe_block.npz."""
    single = hf.Qwen3MoeExperts(config_of(num_experts=1))
    fill(single, "expert")
    x_TD = noise("expert x", 9, 48)
    y_TD = single(x_TD, torch.zeros(9, 1, dtype=torch.long), torch.ones(9, 1))
    gate, up = single.gate_up_proj[0].chunk(2)
    save(golden, "expert", x_TD=x_TD, gate_FD=gate, up_FD=up, down_DF=single.down_proj[0], y_TD=y_TD)
    block = hf.Qwen3MoeSparseMoeBlock(config_of()).eval()
    fill(block, "moe_block")
    x_TD = noise("moe_block x", 33, 48)
    logits, weights, ids = block.gate(x_TD)
    routed = {"logits_TE": logits, "ids_TK": ids, "weights_TK": weights}
    save(golden, "moe_block", x_TD=x_TD, **block_weights(block), **routed, y_TD=block(x_TD[None])[0])


def write_layer(golden: Path) -> None:
    """layer.npz: one decoder layer, whole."""
    config = config_of()
    layer = hf.Qwen3MoeDecoderLayer(config, 0).eval()
    fill(layer, "layer")
    x = noise("layer x", 1, TOKENS, 48)
    mask, rotary = mask_and_rope(config, x)
    y = layer(x, attention_mask=mask, position_embeddings=rotary)
    norms = {"norm1_D": layer.input_layernorm.weight, "norm2_D": layer.post_attention_layernorm.weight}
    numbers = {"eps": config.rms_norm_eps, "theta": 1000000.0, "top_k": config.num_experts_per_tok}
    weights = attention_weights(layer.self_attn) | block_weights(layer.mlp) | norms
    save(golden, "layer", x_TD=x[0], **weights, cos_TP=rotary[0][0], sin_TP=rotary[1][0], y_TD=y[0], **numbers)


def write_parts(golden: Path) -> None:
    """Writes every part."""
    golden.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for write in (write_rmsnorm, write_attention, write_routers, write_experts, write_layer):
            write(golden)
