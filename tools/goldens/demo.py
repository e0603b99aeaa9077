"""The golden of the demo model, and texts with their ids."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from goldens.build import load
from goldens.traces import farthest, generate, golden_arrays

PROMPT = "Once upon a time"
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


def write_demo(demo: Path, target: Path) -> None:
    """Writes demo.npz: logits of a held-out text, a greedy continuation, and the tokenizer's ids of some texts."""
    model = load(demo / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    text = (demo / "heldout.txt").read_text(encoding="utf-8")[: 8 * TOKENS * WINDOWS]
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False)[: TOKENS * WINDOWS])
    ids_T = farthest(model, ids[: len(ids) // TOKENS * TOKENS].reshape(-1, TOKENS))
    prompt_T = torch.tensor(tokenizer.encode(PROMPT, add_special_tokens=False))
    arrays = golden_arrays(model, ids_T, prompt_T, generate(model, prompt_T[None])[0])
    encoded = [[text, tokenizer.encode(text, add_special_tokens=False)] for text in TEXTS]
    np.savez_compressed(target, **arrays, texts=json.dumps(encoded), model_sha256=fingerprint(demo / "model"))
    print(f"demo: margin {arrays['min_margin']:.2e}  router gap {arrays['min_router_gap']:.2e}")
