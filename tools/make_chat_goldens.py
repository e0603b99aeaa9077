"""Remakes tests/golden/chat from transformers; see tests/golden/README.md for the environment.

python tools/make_chat_goldens.py QWEN3     QWEN3 holds Qwen3's tokenizer.json, tokenizer_cases.json and chat templates
python tools/make_chat_goldens.py           from the copies in tests/golden/chat
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from goldens.conversations import CASES, Case
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "chat"
TOKENIZER = "tokenizer.json.xz"
COPIES = {
    "tokenizer_cases.json": "tokenizer_cases.json",
    "chat_template.thinking.jinja": "hybrid.jinja",
    "chat_template.coder.jinja": "coder.jinja",
}
# The 2507 models have the hybrid model's template but for its end, and no switch.
SWITCH = """    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
"""
ENDS = {
    "always.jinja": "    {{- '<|im_start|>assistant\\n<think>\\n' }}\n",
    "instruct.jinja": "    {{- '<|im_start|>assistant\\n' }}\n",
}
SETTINGS = {"hybrid": (None, True, False), "always": (None, True), "instruct": (None, False), "coder": (None, False)}


def copy_inputs(qwen3: Path) -> None:
    """Copies what tests need, so that they need no other folder, and derives the other templates."""
    text = (qwen3 / "tokenizer.json").read_bytes()
    (GOLDEN / TOKENIZER).write_bytes(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    for source, name in COPIES.items():
        shutil.copyfile(qwen3 / source, GOLDEN / name)
    hybrid = (GOLDEN / "hybrid.jinja").read_text()
    assert hybrid.count(SWITCH) == 1
    for name, end in ENDS.items():
        (GOLDEN / name).write_text(hybrid.replace(SWITCH, end))


def expected(tokenizer: Any, template: str, case: Case) -> Case:
    """The text and ids of one conversation; of a hostile one the ids that transformers' sanitizer gives."""
    arguments: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True, "tools": case.get("tools")}
    if case.get("thinking") is not None:
        arguments["enable_thinking"] = case["thinking"]
    messages = case["messages"]
    if "hostile" not in case:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        return {"text": text, "ids": tokenizer.apply_chat_template(messages, return_dict=False, **arguments)}
    every = [token.content for token in tokenizer.added_tokens_decoder.values()]
    tokenizer.chat_control_tokens = every if case["hostile"] == "all" else []
    ids = tokenizer.apply_chat_template(messages, return_dict=False, sanitize_control_tokens=True, **arguments)
    return {"text": tokenizer.decode(ids, clean_up_tokenization_spaces=False), "ids": ids}


def main() -> None:
    """Parses the command line, copies and computes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("qwen3", nargs="?", type=Path)
    options = parser.parse_args()
    GOLDEN.mkdir(exist_ok=True)
    if options.qwen3:
        copy_inputs(options.qwen3)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(lzma.decompress((GOLDEN / TOKENIZER).read_bytes()))
        file.flush()
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=file.name)
    names = [case["name"] for case in CASES]
    assert len(set(names)) == len(names)
    lines = [json.dumps(case, ensure_ascii=False) for case in CASES]
    (GOLDEN / "conversations.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    for name, settings in SETTINGS.items():
        template = (GOLDEN / f"{name}.jinja").read_text()
        found = {c["name"]: expected(tokenizer, template, c) for c in CASES if c.get("thinking") in settings}
        lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in found.items()]
        (GOLDEN / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{name}: {len(found)} conversations")


if __name__ == "__main__":
    main()
