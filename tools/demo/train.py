"""Train the bundled demo model: a 2.1 M parameter Qwen3-MoE that tells short stories.

One thread, AdamW with a cosine schedule, then on at the last rate until the consistency check passes. A run can be
stopped and started again: it goes on from its last checkpoint. `--set` trains the same text at another shape.

    python tools/demo/train.py --work /tmp/demo-training --out dist_moe/demo/model
    python tools/demo/train.py --work /tmp/wide-training --out /tmp/wide --set hidden_size=256 num_experts=8
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from check_consistency import rounded_to_bf16, sample_stories, share_consistent
from stories import TRAIN_SEED, make_document
from tokenizers import Tokenizer
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

POOL_DOCUMENTS = 512
PACKED_SHARE = 0.12  # of the documents, three to a row, so that the model also learns longer contexts
WANTED_SHARE = 0.9
MODEL = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
    "router_aux_loss_coef": 0.001,
}


def setting(text: str) -> tuple[str, int | float]:
    """A NAME=NUMBER of the command line: one entry of MODEL and its value; argparse reports what is neither."""
    name, _, value = text.partition("=")
    if name not in MODEL:
        raise argparse.ArgumentTypeError(f"{name!r} is no setting of the model; it has {', '.join(MODEL)}")
    return name, type(MODEL[name])(json.loads(value))


def new_model(tokenizer: Tokenizer, shape: dict[str, int | float], seed: int) -> Qwen3MoeForCausalLM:
    """The untrained model, its experts computed by grouped matrix products."""
    torch.manual_seed(seed)
    end = tokenizer.token_to_id("<|endoftext|>")
    config = Qwen3MoeConfig(**shape, bos_token_id=end, eos_token_id=tokenizer.token_to_id("<|im_end|>"))
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def make_batches(pool: int, tokenizer: Tokenizer, tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one pool of documents, as (ids, labels): rows of like length, at most `tokens` ids each."""
    rng = random.Random(f"pool {pool}")
    texts = [make_document(TRAIN_SEED, pool * POOL_DOCUMENTS + i) for i in range(POOL_DOCUMENTS)]
    documents = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    packed = int(POOL_DOCUMENTS * PACKED_SHARE) // 3 * 3
    rows = [list(chain(*documents[i : i + 3])) for i in range(0, packed, 3)] + documents[packed:]
    rows.sort(key=len)
    batches, batch = [], []
    for row in rows:
        if batch and len(row) * (len(batch) + 1) > tokens:
            batches.append(batch)
            batch = []
        batch.append(row)
    batches.append(batch)
    rng.shuffle(batches)
    for batch in batches:
        width = len(batch[-1])
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in batch])
        yield ids, labels


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def rate(tokens: int, planned: int, peak: float) -> float:
    """Learning rate after this many tokens: warm-up over 2 %, cosine to 2 % of the peak, then constant."""
    warmup = planned * 0.02
    if tokens < warmup:
        return peak * (tokens + 1) / warmup
    progress = min(1.0, (tokens - warmup) / (planned - warmup))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def export(model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write config.json, model.safetensors (bf16) and generation_config.json as transformers writes them."""
    stored = Qwen3MoeForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    stored.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        top_k=20,
        eos_token_id=ends,
        bos_token_id=ends[1],
        pad_token_id=ends[1],
    )
    stored.to(torch.bfloat16).save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)


def train_pool(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict, batches: Iterator, args: argparse.Namespace
) -> float:
    """Take one step per batch of a pool; return the pool's mean loss (auxiliary loss included)."""
    losses = []
    for ids, labels in batches:
        for group in optimizer.param_groups:
            group["lr"] = rate(state["tokens"], args.tokens, args.peak)
        loss = model(input_ids=ids, labels=labels, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["tokens"] += int((labels >= 0).sum())
        state["steps"] += 1
        losses.append(loss.item())
    return sum(losses) / len(losses)


def main() -> None:
    """Train until the planned tokens are done and the check passes; export at every check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint and the log")
    parser.add_argument("--out", type=Path, default=Path("dist_moe/demo/model"), help="tokenizer, then model")
    parser.add_argument("--tokens", type=int, default=12_000_000)
    parser.add_argument("--most-tokens", type=int, default=20_000_000, help="give up here")
    parser.add_argument("--batch-tokens", type=int, default=3072)
    parser.add_argument("--peak", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check-every", type=int, default=12, help="pools between checks")
    parser.add_argument("--set", type=setting, nargs="+", default=[], metavar="NAME=NUMBER", help="other shape")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    model = new_model(tokenizer, MODEL | dict(args.set), args.seed)
    optimizer = make_optimizer(model)
    state = {"pool": 0, "tokens": 0, "steps": 0, "seconds": 0.0}
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    passed = False
    while state["tokens"] < args.tokens or (not passed and state["tokens"] < args.most_tokens):
        began = time.monotonic()
        loss = train_pool(model, optimizer, state, make_batches(state["pool"], tokenizer, args.batch_tokens), args)
        state["pool"] += 1
        state["seconds"] += time.monotonic() - began
        line = {**state, "seconds": round(state["seconds"]), "loss": round(loss, 4)}
        if state["pool"] % args.check_every == 0 or state["tokens"] >= args.tokens:
            share = share_consistent(sample_stories(rounded_to_bf16(model), tokenizer, 100, seed=state["pool"]))
            passed, line["consistent"] = share >= WANTED_SHARE, share
            export(model, tokenizer, args.out)
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
            torch.save(saved, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
        with (args.work / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
