"""Train the demo model's tokenizer: byte-level BPE with 1024 entries, built like Qwen3's.

Same normalizer (NFC), pre-tokenizer, decoder and the flags of the added tokens; only the vocabulary differs.

    python tools/demo/make_tokenizer.py --out dist_moe/demo/model
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import stories
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

VOCABULARY = 1024
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NOT_SPECIAL = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(documents: int) -> Tokenizer:
    """Learn the merges on the first training documents; the added tokens get the last ids, as in Qwen3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(NOT_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (stories.make_document(stories.TRAIN_SEED, index) for index in range(documents))
    for_merges = (strip_added(text) for text in texts)
    tokenizer.train_from_iterator(for_merges, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in NOT_SPECIAL])
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def strip_added(text: str) -> str:
    """The text without its added tokens, so that no merge is spent on their spelling."""
    for token in SPECIAL + NOT_SPECIAL:
        text = text.replace(token, "")
    return text


def write_tokenizer(out: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json, tokenizer_config.json (with the chat template, as Qwen3's) and chat_template.jinja."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    template_file = Path(__file__).with_name("chat_template.jinja")
    shutil.copyfile(template_file, out / "chat_template.jinja")
    added = {
        str(index): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL[1:],
        "bos_token": None,
        "chat_template": template_file.read_text(),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Train on the first documents of the training text and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("dist_moe/demo/model"))
    parser.add_argument("--documents", type=int, default=20_000)
    args = parser.parse_args()
    write_tokenizer(args.out, train_tokenizer(args.documents))


if __name__ == "__main__":
    main()
