"""Writes a greedy trace of transformers in float32, which `dist-moe verify trace` compares a model with.

    python tools/make_reference.py --model DIR --prompt "Once upon a time" --steps 32 --out reference.npz
    python tools/make_reference.py --model DIR --ids 1,2,3 --steps 8 --out trace     # trace.ids.npy and so on
    python tools/make_reference.py --model DIR --chat "Who are you?" --thinking off --out reference.npz

Needs torch and transformers; the program itself needs neither. A .npz holds prompt_ids, expected_ids, logits
[steps, vocabulary] and facts (which model this is of, as JSON); any other name is the base of three .npy files in the
form of moe.cc's verify_greedy.py.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

KIND = "dist-moe reference 1"  # as dist_moe/cli/reference_file.py reads it


def main() -> None:
    """Parses the command line and writes the trace."""
    args = arguments()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = prompt_ids(args)
    expected, logits_SV = greedy(model, prompt, args.steps)
    write(Path(args.out), prompt, expected, logits_SV, facts(args, model))
    top = np.sort(logits_SV, axis=1)[:, -2:]
    margin = np.ptp(top, axis=1).min()
    print(f"{args.out}: {len(prompt)} tokens of prompt, {len(expected)} steps, least margin {margin:.3g}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to continue, as it is")
    what.add_argument("--chat", metavar="TEXT", help="a user's message, framed by the model's chat template")
    what.add_argument("--ids", help="token ids such as 1,2,3")
    parser.add_argument("--thinking", choices=("auto", "on", "off"), default="auto", help="with --chat")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--out", required=True, help="NAME.npz, or the base name of .npy files")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps: expected a whole number from 1")
    return args


def prompt_ids(args: argparse.Namespace) -> list[int]:
    """What is continued."""
    if args.ids is not None:
        return [int(word) for word in args.ids.split(",")]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.prompt is not None:
        return list(tokenizer.encode(args.prompt, add_special_tokens=False))
    thinking = {} if args.thinking == "auto" else {"enable_thinking": args.thinking == "on"}
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": args.chat}], tokenize=False, add_generation_prompt=True, **thinking
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], steps: int) -> tuple[list[int], np.ndarray]:
    """The best token of every step, which is continued, and the step's logits [S, V]; end tokens end nothing."""
    cache, ids, chosen, rows = None, torch.tensor([prompt]), [], []
    for _ in range(steps):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache, row_V = out.past_key_values, out.logits[0, -1].float()
        chosen.append(int(row_V.argmax()))
        rows.append(row_V.numpy())
        ids = torch.tensor([chosen[-1:]])
    return chosen, np.stack(rows)


def facts(args: argparse.Namespace, model: PreTrainedModel) -> dict[str, Any]:
    """Which model this is of, and how the trace was made."""
    config = model.config
    sizes = {
        "layers": config.num_hidden_layers,
        "model_dim": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": model.model.layers[0].self_attn.head_dim,
        "vocabulary": model.get_input_embeddings().weight.shape[0],
        "inv_freq": model.model.rotary_emb.inv_freq.double().tolist(),
    }
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if experts:
        sizes |= {
            "experts": experts,
            "experts_per_token": config.num_experts_per_tok,
            "norm_topk_prob": bool(config.norm_topk_prob),
        }
    return {
        "kind": KIND,
        "model": str(args.model),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "dtype": "float32",
        "prompt": args.prompt if args.prompt is not None else args.chat,
        "chat": args.chat is not None,
        "thinking": args.thinking,
        "sizes": sizes,
    }


def write(out: Path, prompt: list[int], expected: list[int], logits_SV: np.ndarray, about: dict[str, Any]) -> None:
    """One .npz, or the three .npy files of a base name."""
    if out.suffix == ".npz":
        arrays = {"prompt_ids": np.array(prompt, np.int32), "expected_ids": np.array(expected, np.int32)}
        np.savez_compressed(out, **arrays, logits=logits_SV, facts=json.dumps(about))
        return
    wide = torch.from_numpy(logits_SV).double().softmax(-1).float().numpy()
    arrays = {"ids": np.array(prompt + expected, np.int32), "logits": logits_SV, "probs": wide}
    for part, array in arrays.items():
        np.save(f"{out}.{part}.npy", array)


if __name__ == "__main__":
    main()
