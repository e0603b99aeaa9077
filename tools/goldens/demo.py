"""The golden of the demo model, and texts with their ids."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from goldens.build import load
from goldens.traces import farthest, generate, golden_arrays

PROMPT = "Once upon a time"
OPENINGS = (
    "",
    ",",
    ", there",
    ", there was",
    ", there was a",
    ", there lived",
    ", a",
    ", a small",
    ", a young",
    ", in a",
)
WHO = ("", " girl", " boy", " bear", " farmer", " fox", " rabbit", " girl named", " boy named", " bear named")
NOISE = {"min_margin": 1e-4, "greedy_router_gap": 2e-6}  # what another order of f32 sums may move
CLEAR = 10.0
TOKENS = 100
WINDOWS = 40
TEXTS = (
    PROMPT,
    "Once upon a time, there was a little girl named Lily.",
    " \"I don't know,\" she said.  They're 3 years old!",
    "\n\n  two lines\n\tand a tab\r\n",
    "Crème brûlée, naïve façade: Ελληνικά, 日本語, 🙂👍🏽",
    "e\u0301 decomposed and \u00e9 composed",
    "",
    " ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "<|endoftext|>",
    "x = 12345.678; // 100%",
)


def fingerprint(model: Path) -> str:
    """The SHA-256 of a model's weights, so that a golden of other weights is noticed."""
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def clearness(arrays: dict[str, Any]) -> float:
    """How many times the noise the narrowest decision of a greedy trace is."""
    return min(float(arrays[key]) / noise for key, noise in NOISE.items())


def clear_trace(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids_T: torch.Tensor) -> dict[str, Any]:
    """The golden whose prompt is PROMPT if all its decisions are clear, else the clearest of prompts that begin so."""
    best: dict[str, Any] = {}
    for text in dict.fromkeys(PROMPT + opening + who for who in WHO for opening in OPENINGS if who == "" or opening):
        prompt_T = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
        arrays = golden_arrays(model, ids_T, prompt_T, generate(model, prompt_T[None])[0]) | {"prompt": text}
        if not best or clearness(arrays) > clearness(best):
            best = arrays
        if text == PROMPT and clearness(best) >= CLEAR:
            break
    return best


def write_demo(demo: Path, target: Path) -> None:
    """Writes demo.npz: logits of a held-out text, a greedy continuation, and the tokenizer's ids of some texts."""
    model = load(demo / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    text = (demo / "heldout.txt").read_text(encoding="utf-8")[: 8 * TOKENS * WINDOWS]
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False)[: TOKENS * WINDOWS])
    ids_T = farthest(model, ids[: len(ids) // TOKENS * TOKENS].reshape(-1, TOKENS))
    arrays = clear_trace(model, tokenizer, ids_T)
    encoded = [[text, tokenizer.encode(text, add_special_tokens=False)] for text in TEXTS]
    np.savez_compressed(target, **arrays, texts=json.dumps(encoded), model_sha256=fingerprint(demo / "model"))
    gaps = f"{arrays['greedy_router_gap']:.2e} and {arrays['ids_router_gap']:.2e}"
    print(f"demo: {arrays['prompt']!r}: margin {arrays['min_margin']:.2e}  router gaps {gaps}")
