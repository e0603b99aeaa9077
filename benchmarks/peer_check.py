"""One GGUF file of random Q4_0 weights through both engines: how far their logits are from each other and from f32.

Called by `peers.py --check`. The third run is ours on the same weights, widened to f32 without rounding any activation.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from llama_process import Llama, Setup

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

LAYERS, DIM, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, PICKED, HIDDEN, VOCABULARY = 4, 512, 8, 2, 64, 16, 4, 384, 8192
POSITIONS = 300
PEAK = 6.0  # standard deviation of the logits: sharp enough for a top-1 that means something
# Of another model the divergence is several nats; of this one, a flipped expert here and there decides.
LARGEST_KL, LEAST_TOP1 = 0.05, 0.85


def write_model(path: Path, seed: int) -> None:
    """Write a random Qwen3-MoE whose activations stay near 1."""
    random = np.random.default_rng(seed)
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(PICKED)
    writer.add_expert_feed_forward_length(HIDDEN)

    def matrix(name: str, *shape: int, scale: float = 1.0) -> None:
        values = random.standard_normal(shape, np.float32) * np.float32(scale / shape[-1] ** 0.5)
        writer.add_tensor(name, quantize(values, GGMLQuantizationType.Q4_0), raw_dtype=GGMLQuantizationType.Q4_0)

    def gains(name: str, length: int) -> None:
        writer.add_tensor(name, 1 + 0.1 * random.standard_normal(length, np.float32))

    writer.add_tensor("token_embd.weight", random.standard_normal((VOCABULARY, DIM), np.float32))
    gains("output_norm.weight", DIM)
    matrix("output.weight", VOCABULARY, DIM, scale=PEAK)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        for name, length in (
            ("attn_norm", DIM),
            ("ffn_norm", DIM),
            ("attn_q_norm", HEAD_DIM),
            ("attn_k_norm", HEAD_DIM),
        ):
            gains(f"{prefix}{name}.weight", length)
        matrix(prefix + "attn_q.weight", HEADS * HEAD_DIM, DIM)
        matrix(prefix + "attn_k.weight", KV_HEADS * HEAD_DIM, DIM)
        matrix(prefix + "attn_v.weight", KV_HEADS * HEAD_DIM, DIM)
        matrix(prefix + "attn_output.weight", DIM, HEADS * HEAD_DIM)
        router = random.standard_normal((EXPERTS, DIM), np.float32) * np.float32(2 / DIM**0.5)
        writer.add_tensor(prefix + "ffn_gate_inp.weight", router)
        matrix(prefix + "ffn_gate_exps.weight", EXPERTS, HIDDEN, DIM)
        matrix(prefix + "ffn_up_exps.weight", EXPERTS, HIDDEN, DIM)
        matrix(prefix + "ffn_down_exps.weight", EXPERTS, DIM, HIDDEN, scale=2.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def our_logits(model: Path, ids: Path, output: Path, quant: str, kv: str) -> F32:
    """`dist-moe logits` on the GGUF file itself."""
    words = ["-m", str(model), "--quant", quant, "--kv", kv, "--ids", str(ids), "-o", str(output)]
    subprocess.run([sys.executable, "-m", "dist_moe", "logits", *words], check=True)
    logits: F32 = np.load(output)
    return logits


def log_probabilities(logits_TV: F32) -> F64:
    """The logarithms of the softmax, in f64."""
    shifted = logits_TV.astype(np.float64) - logits_TV.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def distance(a_TV: F32, b_TV: F32) -> tuple[float, float, float]:
    """Mean and largest Kullback-Leibler divergence of b from a, and how often both agree on the first token."""
    a, b = log_probabilities(a_TV), log_probabilities(b_TV)
    kl_T = (np.exp(a) * (a - b)).sum(axis=1)
    return float(kl_T.mean()), float(kl_T.max()), float((a.argmax(axis=1) == b.argmax(axis=1)).mean())


def check(python: str, threads: int, seed: int = 1) -> str:
    """Compare; the table as Markdown.

    Raises:
        SystemExit: The engines do not compute the same model.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model, ids = directory / "model.gguf", directory / "ids.npy"
        write_model(model, seed)
        tokens = np.random.default_rng(seed + 1).integers(0, VOCABULARY, POSITIONS)
        np.save(ids, tokens)
        exact = our_logits(model, ids, directory / "f32.npy", "f32", "f32")
        ours = our_logits(model, ids, directory / "q4.npy", "q4", "f16")
        llama = Llama(Setup(python, repack=False), model, threads)  # the weights as the file has them
        wanted = {"test": "logits", "ids": tokens.tolist(), "output": str(directory / "l.npy")}
        llama.ask({**wanted, "kv": "f16", "flash": True})
        llama.close()
        theirs: F32 = np.load(directory / "l.npy")
    pairs = {
        "llama.cpp against dist-moe": (ours, theirs),
        "dist-moe against f32 activations": (exact, ours),
        "llama.cpp against f32 activations": (exact, theirs),
    }
    lines = [
        f"{POSITIONS} positions, {LAYERS} layers, Q4_0 weights",
        "",
        "| | mean KL | largest KL | same top-1 |",
        "|---|--:|--:|--:|",
    ]
    for words, (a, b) in pairs.items():
        mean, largest, same = distance(a, b)
        lines.append(f"| {words} | {mean:.2e} | {largest:.2e} | {same:.1%} |")
        if mean > LARGEST_KL or same < LEAST_TOP1:
            raise SystemExit("\n".join([*lines, "", "the engines do not compute the same model"]))
    return "\n".join(lines)
