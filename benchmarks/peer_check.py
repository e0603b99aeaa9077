"""One GGUF file of random Q4_0 weights through both engines: do they decode the same weights, how far are the logits?

Called by `peers.py --check`. A third run is ours on the same weights, widened to f32 without rounding any activation:
its distance to both says what int8 activations do.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from llama_process import Llama, Setup

from dist_moe.checkpoint.gguf_names import gguf_locations
from dist_moe.kernels import Kernels
from dist_moe.kernels.formats import GROUP, WeightFormat
from dist_moe.store.decoded import DecodedStore
from dist_moe.store.reader import Store

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """Of a random model."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    picked: int
    hidden: int
    vocabulary: int


SHAPES = {
    "small": Shape(4, 512, 8, 2, 64, 16, 4, 384, 8192),
    # Two layers of Qwen3-30B-A3B with its vocabulary: 10 GB of temporary files and 5 GB of memory, minutes.
    "qwen3-30b-a3b": Shape(2, 2048, 32, 4, 128, 128, 8, 768, 151936),
}
POSITIONS = 300
CODE_RMS = 4.64  # of codes drawn evenly from -8 ... 7
PEAK = 6.0  # standard deviation of the logits: sharp enough for a top-1 that means something
# Of another model the divergence is several nats; of this one, a flipped expert here and there decides.
LARGEST_KL, LEAST_TOP1 = 0.05, 0.85


def write_model(path: Path, shape: Shape, seed: int) -> None:
    """Write a random Qwen3-MoE whose activations stay near 1."""
    random = np.random.default_rng(seed)
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_block_count(shape.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.dim)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("none")
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.picked)
    writer.add_expert_feed_forward_length(shape.hidden)

    def matrix(name: str, *lengths: int, scale: float = 1.0) -> None:
        """Random codes, and scales of either sign, so that their mean of -1/2 does not add up."""
        blocks = (*lengths[:-1], lengths[-1] // GROUP)
        data = np.empty((*blocks, 18), np.uint8)
        data[..., 2:] = np.frombuffer(random.bytes(data[..., 2:].size), np.uint8).reshape(*blocks, 16)
        size = random.uniform(0.75, 1.25, blocks) * random.choice((-1, 1), blocks)
        data[..., :2] = (size * scale / (CODE_RMS * lengths[-1] ** 0.5)).astype(np.float16)[..., None].view(np.uint8)
        writer.add_tensor(name, data.reshape(*lengths[:-1], -1), raw_dtype=GGMLQuantizationType.Q4_0)

    def gains(name: str, length: int) -> None:
        writer.add_tensor(name, 1 + 0.1 * random.standard_normal(length, np.float32))

    writer.add_tensor("token_embd.weight", random.standard_normal((shape.vocabulary, shape.dim), np.float32))
    gains("output_norm.weight", shape.dim)
    matrix("output.weight", shape.vocabulary, shape.dim, scale=PEAK)
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        for name, length in (
            ("attn_norm", shape.dim),
            ("ffn_norm", shape.dim),
            ("attn_q_norm", shape.head_dim),
            ("attn_k_norm", shape.head_dim),
        ):
            gains(f"{prefix}{name}.weight", length)
        matrix(prefix + "attn_q.weight", shape.heads * shape.head_dim, shape.dim)
        matrix(prefix + "attn_k.weight", shape.kv_heads * shape.head_dim, shape.dim)
        matrix(prefix + "attn_v.weight", shape.kv_heads * shape.head_dim, shape.dim)
        matrix(prefix + "attn_output.weight", shape.dim, shape.heads * shape.head_dim)
        router = random.standard_normal((shape.experts, shape.dim), np.float32) * np.float32(2 / shape.dim**0.5)
        writer.add_tensor(prefix + "ffn_gate_inp.weight", router)
        matrix(prefix + "ffn_gate_exps.weight", shape.experts, shape.hidden, shape.dim)
        matrix(prefix + "ffn_up_exps.weight", shape.experts, shape.hidden, shape.dim)
        matrix(prefix + "ffn_down_exps.weight", shape.experts, shape.dim, shape.hidden, scale=2.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def our_store(model: Path, quant: str) -> Path:
    """The GGUF file as a store beside it."""
    store = model.with_name(quant)
    words = ["shard", str(model), "--quant", quant, "-o", str(store), "--quiet"]
    subprocess.run([sys.executable, "-m", "dist_moe", *words], check=True, stdout=subprocess.DEVNULL)
    return store


def our_logits(store: Path, ids: Path, kv: str, threads: int) -> F32:
    """`dist-moe logits`."""
    output = store.with_suffix(".npy")
    words = ["logits", "-m", str(store), "--kv", kv, "--threads", str(threads), "--ids", str(ids), "-o", str(output)]
    subprocess.run([sys.executable, "-m", "dist_moe", *words], check=True)
    logits: F32 = np.load(output)
    return logits


def our_digests(directory: Path) -> dict[str, str]:
    """Of every Q4_0 tensor of the file, named as there: the digest of the values that a store has for it."""
    store = Store.open(directory)
    found: dict[str, hashlib.blake2b] = {}
    with Kernels(1) as kernels:
        decoded = DecodedStore(store, kernels)
        for name, place in gguf_locations(store.config, {"output.weight"}).items():
            if len(place.tensor_shape) > 1 and decoded.format(name).format == WeightFormat.Q4:
                found.setdefault(place.tensor, hashlib.blake2b()).update(decoded.whole(name).data)
    return {name: digest.hexdigest() for name, digest in found.items()}


def log_probabilities(logits_TV: F32) -> F64:
    """The logarithms of the softmax, in f64."""
    shifted = logits_TV.astype(np.float64) - logits_TV.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def distance(a_TV: F32, b_TV: F32) -> tuple[float, float, float]:
    """Mean and largest Kullback-Leibler divergence of b from a, and how often both agree on the first token."""
    a, b = log_probabilities(a_TV), log_probabilities(b_TV)
    kl_T = (np.exp(a) * (a - b)).sum(axis=1)
    return float(kl_T.mean()), float(kl_T.max()), float((a.argmax(axis=1) == b.argmax(axis=1)).mean())


def check(python: str, threads: int, shape: Shape, seed: int = 1) -> str:
    """Compare; the table as Markdown.

    Raises:
        SystemExit: The engines do not decode the same weights, or do not compute the same model.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model, ids = directory / "model.gguf", directory / "ids.npy"
        write_model(model, shape, seed)
        tokens = np.random.default_rng(seed + 1).integers(0, shape.vocabulary, POSITIONS)
        np.save(ids, tokens)
        wide = our_store(model, "f32")
        exact = our_logits(wide, ids, "f32", threads)
        shutil.rmtree(wide)
        packed = our_store(model, "q4")
        ours, our_weights = our_logits(packed, ids, "f16", threads), our_digests(packed)
        llama = Llama(Setup(python, repack=False), model, threads)  # the weights as the file has them
        wanted = {"test": "logits", "ids": tokens.tolist(), "output": str(directory / "l.npy")}
        llama.ask({**wanted, "kv": "f16", "flash": True})
        their_weights = llama.ask({"test": "weights"})["digests"]
        llama.close()
        theirs: F32 = np.load(directory / "l.npy")
    different = [name for name in our_weights if our_weights[name] != their_weights.get(name)]
    if different or our_weights.keys() != their_weights.keys():
        raise SystemExit(f"the engines decode other weights: {', '.join(different) or 'not the same tensors'}")
    pairs = {
        "llama.cpp against dist-moe": (ours, theirs),
        "dist-moe against f32 activations": (exact, ours),
        "llama.cpp against f32 activations": (exact, theirs),
    }
    lines = [
        f"{shape}",
        f"{POSITIONS} positions; {len(our_weights)} tensors of Q4_0 weights, all decoded to the same bits",
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
