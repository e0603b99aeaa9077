"""Weights are mapped, not copied: what a rank and a conversion hold for themselves, on layers of the 30B's shape."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

RUN_LIMIT_BYTES = 300e6
SHARD_LIMIT_BYTES = 2e9

# Prints the peak of this process's anonymous memory, sampled by a thread, and the bytes of the KV cache.
PROGRAM = """
import sys, threading, time
from pathlib import Path
from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.engine.runtime import Runtime, EngineOptions
from dist_moe.engine.requests.request import Request
from dist_moe.parallel.world import World
from dist_moe.store.convert import convert
from dist_moe.store.plan import StoreOptions
from dist_moe.store.reader import Store

peak = 0
def sample():
    global peak
    while True:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = max(peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))
        time.sleep(0.01)
threading.Thread(target=sample, daemon=True).start()

source, store = Path(sys.argv[2]), Path(sys.argv[3])
cache = 0
if sys.argv[1] == "shard":
    convert(Checkpoint.open(source), store, StoreOptions(), lambda *told: None)
else:
    engine = Runtime(Store.open(store), World(), EngineOptions(context=1000, threads=2))
    engine.generate([Request(tuple(range(600)), 3)])
    cache = engine.model.cache.allocated_bytes
time.sleep(0.05)
print(peak - cache)
"""


def write_sparse_checkpoint(directory: Path) -> Path:
    """One layer of Qwen3-30B-A3B's shape in bf16 with a smaller vocabulary; the weights are a hole in the file."""
    D, H, G, P, E, F, V = 2048, 32, 4, 128, 128, 768, 32000
    layer, attention = "model.layers.0.", "model.layers.0.self_attn."
    shapes = {
        "model.embed_tokens.weight": (V, D),
        "lm_head.weight": (V, D),
        "model.norm.weight": (D,),
        layer + "input_layernorm.weight": (D,),
        layer + "post_attention_layernorm.weight": (D,),
        attention + "q_norm.weight": (P,),
        attention + "k_norm.weight": (P,),
        attention + "q_proj.weight": (H * P, D),
        attention + "k_proj.weight": (G * P, D),
        attention + "v_proj.weight": (G * P, D),
        attention + "o_proj.weight": (D, H * P),
        layer + "mlp.gate.weight": (E, D),
    }
    for expert in range(E):
        name = f"{layer}mlp.experts.{expert}."
        shapes |= {
            name + "gate_proj.weight": (F, D),
            name + "up_proj.weight": (F, D),
            name + "down_proj.weight": (D, F),
        }
    header, at = {}, 0
    for name, shape in shapes.items():
        length = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    directory.mkdir()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": P,
        "hidden_act": "silu",
        "hidden_size": D,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "moe_intermediate_size": F,
        "norm_topk_prob": True,
        "num_attention_heads": H,
        "num_experts": E,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 1,
        "num_key_value_heads": G,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": V,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def private_bytes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Peak private memory of packing and of running, less the KV cache."""
    directory = tmp_path_factory.mktemp("large")
    source = write_sparse_checkpoint(directory / "source")
    found = {}
    for job in ("shard", "run"):
        command = [sys.executable, "-c", PROGRAM, job, str(source), str(directory / "store")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True)
        found[job] = int(done.stdout)
        print(f"{job}: {found[job] / 1e6:.0f} MB")
    return found


def test_a_rank_holds_less_than_300_mb(private_bytes: dict[str, int]) -> None:
    assert 1e6 < private_bytes["run"] < RUN_LIMIT_BYTES


def test_packing_holds_less_than_2_gb(private_bytes: dict[str, int]) -> None:
    assert 1e6 < private_bytes["shard"] < SHARD_LIMIT_BYTES
