"""Measure the held-out perplexity of the demo model in fp32 and write five sampled stories.

Each held-out story is a sequence of its own, ended by <|endoftext|>; all its tokens but the first are predicted.

    python tools/demo/evaluate.py dist_moe/demo
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from check_consistency import sample_stories
from stories import END_OF_TEXT
from tokenizers import Tokenizer
from transformers import Qwen3MoeForCausalLM

HEADER = """# Five stories by the bundled model

Sampled one after another, not selected: prompt "Once upon a time", temperature 0.7, top-p 0.95, top-k 20, computed by
transformers in fp32 from the stored bf16 weights (`python tools/demo/evaluate.py dist_moe/demo`, seed {seed}).
"""


@torch.no_grad()
def perplexity(model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, text: str) -> tuple[float, int]:
    """Perplexity per token over the stories of a text, and the number of tokens predicted."""
    total, count = 0.0, 0
    for story in text.split(END_OF_TEXT)[:-1]:
        ids = torch.tensor([tokenizer.encode(story + END_OF_TEXT).ids])
        logits = model(ids).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count), count


def main() -> None:
    """Print the perplexity; write STORIES.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="has model/ and heldout.txt; gets STORIES.md")
    parser.add_argument("--seed", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(args.demo / "model" / "tokenizer.json"))
    model = Qwen3MoeForCausalLM.from_pretrained(args.demo / "model", dtype=torch.float32).eval()
    value, count = perplexity(model, tokenizer, (args.demo / "heldout.txt").read_text(encoding="utf-8"))
    print(f"held-out perplexity {value:.4f} over {count} tokens")
    stories = sample_stories(model, tokenizer, 5, args.seed)
    parts = [f"\n## {number}\n\n{story.removesuffix(END_OF_TEXT)}\n" for number, story in enumerate(stories, 1)]
    (args.demo / "STORIES.md").write_text(HEADER.format(seed=args.seed) + "".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
