"""What quantization costs on the demo's held-out text. The figures: pytest -s tests/engine/test_quality.py."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest

from dist_moe.demo import demo_model_directory
from dist_moe.engine.runtime import EngineOptions, Runtime
from dist_moe.kernels import KvFormat
from dist_moe.parallel.world import World
from dist_moe.text.tokenizer import Tokenizer

END = "<|endoftext|>"
STORIES = 40


@dataclass(frozen=True)
class Quality:
    """Perplexity, and mean Kullback-Leibler divergence from f32, over all predicted tokens."""

    perplexity: float
    kl: float


def stories() -> list[list[int]]:
    """Held-out stories, each a sequence of its own: the model is trained on whole documents."""
    directory = demo_model_directory()
    text = (directory.parent / "heldout.txt").read_text(encoding="utf-8")
    parts = [part + END for part in text.split(END)[:STORIES]]
    return [Tokenizer(directory).encode_trusted(part) for part in parts]


def log_probabilities(make_engine, store, kv: KvFormat) -> list[np.ndarray]:
    """Per story float64 [tokens - 1, V]: the log-probabilities of the next token."""
    engine = make_engine(store, kv=kv)
    found = []
    for ids in stories():
        rows: list[np.ndarray] = []
        engine.logits(ids, lambda rows_NV, rows=rows: rows.append(rows_NV.astype(np.float64)))
        logits_TV = np.concatenate(rows)[:-1]
        shifted = logits_TV - logits_TV.max(axis=1, keepdims=True)
        found.append(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
    return found


@pytest.fixture(scope="module")
def qualities(make_store) -> dict[str, Quality]:
    """Quality of every format; the reference is f32 with f32 K and V."""
    with ExitStack() as stack:

        def make_engine(store, **options):
            engine = Runtime(store, World(), EngineOptions(context=2048, **options))
            stack.callback(engine.kernels.close)
            return engine

        reference = log_probabilities(make_engine, make_store(demo_model_directory(), "f32"), KvFormat.F32)
        targets = [np.array(ids[1:]) for ids in stories()]
        found: dict[str, Quality] = {}
        for weights, kv in (
            ("f32", KvFormat.F32),
            ("bf16", KvFormat.F32),
            ("bf16", KvFormat.F16),
            ("q8", KvFormat.F16),
            ("q8", KvFormat.Q8),
            ("q4", KvFormat.F16),
            ("q4", KvFormat.Q8),
        ):
            own = log_probabilities(make_engine, make_store(demo_model_directory(), weights), kv)
            pairs = list(zip(reference, own, strict=True))
            kl = np.concatenate([(np.exp(p) * (p - q)).sum(axis=1) for p, q in pairs]).mean()
            picked = [q[np.arange(len(ids)), ids] for q, ids in zip(own, targets, strict=True)]
            perplexity = np.exp(-np.concatenate(picked).mean())
            found[f"{weights}, kv {kv.label}"] = Quality(float(perplexity), float(kl))
    for name, quality in found.items():
        print(f"{name:14} perplexity {quality.perplexity:.4f}  mean KL {quality.kl:.2e}")
    return found


def test_q8_is_close_to_f32(qualities) -> None:
    assert qualities["q8, kv f16"].kl <= 1e-3


def test_q4_perplexity_is_within_3_percent(qualities) -> None:
    assert qualities["q4, kv f16"].perplexity <= 1.03 * qualities["f32, kv f32"].perplexity


def test_bf16_is_exact_for_a_bf16_checkpoint(qualities) -> None:
    assert qualities["bf16, kv f32"].kl == 0.0
