"""Sample stories from the demo model and check that each keeps its hero, friend and object to the end.

Loss does not show this: a model can write fluent sentences and still change a name in mid-story. Also reported is the
longest run of tokens that a sampled story has in common with the training text. Exit code 0 if both are good.

    python tools/demo/check_consistency.py dist_moe/demo/model --stories 100 --documents 46080
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from pathlib import Path

import torch
import words
from repeats import longest_repeat
from roles import roles_kept
from stories import PRONOUNS, TRAIN_SEED, make_document
from tokenizers import Tokenizer
from transformers import Qwen3MoeForCausalLM

PROMPT = "Once upon a time"
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 20}
WORD = re.compile(r"[A-Za-z]+")
LONGEST_REPEAT = 50


def rounded_to_bf16(model: Qwen3MoeForCausalLM) -> Qwen3MoeForCausalLM:
    """A copy with the weights that the bf16 file would hold, computed in fp32."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
    return rounded.eval()


@torch.no_grad()
def sample_stories(
    model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, count: int, seed: int, most: int = 400
) -> list[str]:
    """Sample stories from the prompt, all in one batch; a story without an end lacks the end-of-text token."""
    torch.manual_seed(seed)
    end = tokenizer.token_to_id("<|endoftext|>")
    prompt = torch.tensor([tokenizer.encode(PROMPT).ids] * count)
    limits = {"max_new_tokens": most, "eos_token_id": end, "pad_token_id": end}
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), **limits, **SAMPLING)
    texts = (tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in ids)
    return [re.sub(r"(<\|endoftext\|>)+$", "<|endoftext|>", text) for text in texts]


def mentions(text: str, among: list[str]) -> list[str]:
    """The words of `text` that are in the list, each once, in order of their first mention."""
    return list(dict.fromkeys(word for word in WORD.findall(text) if word in among))


def find_fault(story: str) -> str | None:
    """What is inconsistent in a story, or None if nothing.

    Exactly two names and one object in all, introduced in the opening and all three still there in the ending; one
    colour of the object; pronouns that fit the hero, who is always named first.
    """
    if not story.endswith("<|endoftext|>"):
        return "no end"
    paragraphs = story.removesuffix("<|endoftext|>").split("\n\n")
    opening, ending = paragraphs[0], paragraphs[-1]
    names, objects = mentions(story, words.NAMES), mentions(story, words.OBJECTS)
    if len(mentions(opening, words.NAMES)) != 2 or len(names) != 2:
        return f"names {names}"
    if len(mentions(opening, words.OBJECTS)) != 1 or len(objects) != 1:
        return f"objects {objects}"
    if sorted(mentions(ending, words.NAMES)) != sorted(names) or mentions(ending, words.OBJECTS) != objects:
        return "ending without hero, friend or object"
    colours = set(re.findall(rf"(\w+) {objects[0]}\b", story)) & set(words.COLOURS)
    if len(colours) > 1:
        return f"colours {sorted(colours)}"
    wrong = set(PRONOUNS[names[0] not in words.GIRLS]) & set(WORD.findall(opening.lower()))
    if wrong:
        return f"pronouns {sorted(wrong)} of {names[0]}"
    return None


def share_consistent(stories: list[str]) -> float:
    """The share of stories without a fault."""
    return sum(find_fault(story) is None for story in stories) / len(stories)


def main() -> None:
    """Sample, check, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--wanted", type=float, default=0.9, help="share of consistent stories")
    parser.add_argument("--documents", type=int, default=0, help="training documents to compare with (0: none)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = Qwen3MoeForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    stories = sample_stories(model, tokenizer, args.stories, args.seed)
    for number, story in enumerate(stories):
        if fault := find_fault(story):
            print(f"story {number}: {fault}")
    share = share_consistent(stories)
    print(f"consistent: {share:.0%} of {args.stories} stories")
    kept = sum(map(roles_kept, stories)) / args.stories
    print(f"every sentence is the grammar's own, each name in its role: {kept:.0%}")
    repeat = 0
    if args.documents:
        texts = (make_document(TRAIN_SEED, index) for index in range(args.documents))
        repeat = longest_repeat(stories, texts, tokenizer)
        print(f"longest run repeated from {args.documents} training documents: {repeat} tokens")
    sys.exit(0 if share >= args.wanted and repeat <= LONGEST_REPEAT else 1)


if __name__ == "__main__":
    main()
