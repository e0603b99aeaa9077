"""What quantization costs: our formats and llama.cpp's of one checkpoint on one text, as one table.

    pip install '.[mpich,peers]'
    python benchmarks/quality.py CHECKPOINT TEXT --split '<|endoftext|>'
    python benchmarks/quality.py CHECKPOINT TEXT --calibrate THIRD_TEXT --target-bits 4.75   # adds importance and auto

Every row reads the same windows of the same tokens with f16 K and V. Perplexity, mean Kullback-Leibler divergence in
nats and agreement of the most probable token are computed by the functions of `dist-moe perplexity`, for both engines
against one base: our f32 store with f32 K and V. "bits" counts the packed matrices only (q, k, v, o, experts, lm_head:
scales and padding included), "bytes" all weight files. llama.cpp's files are made by its own quantizer from a GGUF file
with the values of the checkpoint. It keeps the embedding's values, as we do; which type lm_head gets is its choice,
except where a row says "pure". `--peer-python` names the Python that has llama-cpp-python, if it is another one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from llama_process import Llama, Setup
from store_to_gguf import write_gguf

from dist_moe.checkpoint.safetensors_file import SafetensorsFile
from dist_moe.cli.documents import documents_of
from dist_moe.cli.kl_base import KlBase
from dist_moe.cli.perplexity import Piece, Scores, pieces_of
from dist_moe.engine.perplexity import Mean
from dist_moe.model_config import ModelConfig
from dist_moe.store.layout import CHECKSUM_SUFFIX, weight_files
from dist_moe.store.manifest import COMMON_NAME
from dist_moe.store.reader import Store
from dist_moe.text.tokenizer import Tokenizer

OURS = {
    "bf16": "--quant bf16",
    "q8 absmax": "--quant q8 --scales absmax",
    "q8 mse": "--quant q8 --scales mse",
    "q4 absmax": "--quant q4 --scales absmax",
    "q4 mse": "--quant q4 --scales mse",
    "q4-mixed mse": "--recipe q4-mixed --scales mse",
}
SENSITIVITY_TOKENS = 1024
PEERS = ("F16", "Q8_0", "Q4_0", "Q4_0 pure", "IQ4_NL", "IQ4_NL pure", "Q4_K_S", "Q4_K_M")
PARTS_OF_BITS = ("attn_q.", "attn_k.", "attn_v.", "attn_output.", "ffn_gate", "ffn_up", "ffn_down", "output.weight")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    engine: str
    weights: str
    bits: float
    file_bytes: int
    perplexity: float
    ratio: Mean
    kl: Mean
    same_top: Mean


@dataclass(frozen=True)
class Task:
    """What all rows have in common."""

    checkpoint: Path
    text: Path
    split: str | None
    window: int
    stride: int
    threads: int
    work: Path
    python: str  # that has llama-cpp-python

    @property
    def base(self) -> Path:
        """The reference's logits."""
        return self.work / "base.npz"

    def run(self, *words: str) -> str:
        """A dist-moe command; what it printed."""
        done = subprocess.run([sys.executable, "-m", "dist_moe", *words], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"dist-moe {shlex.join(words)}: exit code {done.returncode}\n{done.stderr}")
        return done.stdout

    def measure(self, store: Path, kv: str) -> dict[str, object]:
        """`dist-moe perplexity` of a store beside the base, which the first call writes."""
        words = ["perplexity", str(self.text), "-m", str(store), "--kv", kv, "--threads", str(self.threads)]
        words += ["--window", str(self.window), "--stride", str(self.stride), "--kl-base", str(self.base), "--json"]
        found: dict[str, object] = json.loads(self.run(*words, *(["--split", self.split] if self.split else [])))
        return found

    def pack(self, name: str, options: str) -> Path:
        """A store of the checkpoint, made with these options of `dist-moe shard`."""
        store = self.work / name.replace(" ", "-")
        self.run("shard", str(self.checkpoint), *shlex.split(options), "-o", str(store), "--quiet", "--force")
        return store


def matrix_weights(config: ModelConfig) -> int:
    """Weights of all packed matrices, padding not counted."""
    attention = config.model_dim * config.head_dim * 2 * (config.heads + config.kv_heads)
    mlps = sum(3 * config.layer_experts(i) * config.layer_hidden(i) * config.model_dim for i in range(config.layers))
    return config.layers * attention + mlps + config.vocabulary * config.model_dim


def store_bits(store: Store) -> float:
    """Bits per weight of a store's units."""
    total = 0
    for name in weight_files(store.manifest):
        if name != COMMON_NAME:
            file = SafetensorsFile(store.directory / name)
            total += sum(file.raw(tensor).nbytes for tensor in file.names() if not tensor.endswith(CHECKSUM_SUFFIX))
    return 8 * total / matrix_weights(store.config)


def gguf_bits(path: Path, config: ModelConfig) -> float:
    """Bits per weight of the same matrices in a GGUF file."""
    packed = [
        tensor
        for tensor in GGUFReader(path).tensors
        if tensor.name.removeprefix("blk.").lstrip("0123456789.").startswith(PARTS_OF_BITS)
        and "norm" not in tensor.name
        and "gate_inp" not in tensor.name
    ]
    assert sum(tensor.n_elements for tensor in packed) == matrix_weights(config)
    return float(8 * sum(tensor.n_bytes for tensor in packed) / matrix_weights(config))


def our_rows(task: Task, recipes: dict[str, str]) -> Iterator[Row]:
    """A row for each of our recipes."""
    for name, options in recipes.items():
        path = task.pack(name, options)
        found = task.measure(path, "f16")
        comparison = found["comparison"]
        assert isinstance(comparison, dict)
        means = {key: Mean(**comparison[key]) for key in ("ratio", "kl", "same_top")}
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        yield Row("dist-moe", name, store_bits(Store.open(path)), size, float(str(found["perplexity"])), **means)


def their_rows(task: Task, reference: Path, peers: list[str]) -> Iterator[Row]:
    """A row for each of llama.cpp's types."""
    store = Store.open(reference)
    tokenizer = Tokenizer(reference)
    documents = documents_of(task.text, task.split, tokenizer)
    pieces = pieces_of(documents, task.window, task.stride)
    original = task.work / "original.gguf"
    write_gguf(store, original)
    for name in peers:
        path = task.work / f"{name.replace(' ', '-')}.gguf"
        words = [str(original), str(path), name.split()[0], *(["--pure"] if name.endswith(" pure") else [])]
        script = Path(__file__).with_name("llama_quantize.py")
        subprocess.run([task.python, str(script), *words, "--threads", str(task.threads)], check=True)
        scores = their_scores(task, path, pieces, store.config.vocabulary)
        comparison = scores.comparison()
        assert comparison is not None
        bits, size = gguf_bits(path, store.config), path.stat().st_size
        means = {"ratio": comparison.ratio, "kl": comparison.kl, "same_top": comparison.same_top}
        yield Row("llama.cpp", name, bits, size, scores.perplexity().value, **means)


def their_scores(task: Task, path: Path, pieces: list[Piece], vocabulary: int) -> Scores:
    """llama.cpp's logits of the same windows, compared with the base; weights as they lie in the file."""
    targets = np.array([token for piece in pieces for token in piece.targets], np.int32)
    llama = Llama(Setup(task.python, repack=False), path, task.threads)
    output = task.work / "logits.npy"
    try:
        with KlBase(task.base, targets, vocabulary) as base:
            scores = Scores(base)
            for piece in pieces:
                wanted = {"test": "logits", "ids": piece.ids, "output": str(output), "kv": "f16", "flash": True}
                llama.ask(wanted)
                scores.add(np.load(output)[piece.first_row : -1], piece.targets)
    finally:
        llama.close()
    return scores


def table(rows: list[Row]) -> str:
    """Markdown, by bits."""
    lines = [
        "| engine | weights | bits | bytes | perplexity | of the base's | mean KL, nats | same top |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: -row.bits):
        ratio, kl, same = row.ratio, row.kl, row.same_top
        lines.append(
            f"| {row.engine} | {row.weights} | {row.bits:.2f} | {row.file_bytes:,} | {row.perplexity:.4f} "
            f"| {ratio.value:.5f} ± {ratio.error:.5f} | {kl.value:.3e} ± {kl.error:.1e} "
            f"| {100 * same.value:.2f} ± {100 * same.error:.2f} % |"
        )
    return "\n".join(lines)


def recipes_of(arguments: argparse.Namespace, task: Task, reference: Path) -> dict[str, str]:
    """Names of our rows, and the options of `dist-moe shard` that make them."""
    recipes = dict(OURS if not arguments.ours else [words.split("=", 1) for words in arguments.ours])
    if arguments.calibrate is not None:
        importance = task.work / "importance"
        split = ["--split", task.split] if task.split else []
        words = [str(arguments.calibrate), *split, "-m", str(reference), "-o", str(importance), "--force"]
        task.run("calibrate", *words, "--sensitivity", str(SENSITIVITY_TOKENS))
        recipes["q4 mse, importance"] = f"--quant q4 --scales mse --importance {importance}"
        recipes["q4-mixed mse, importance"] = f"--recipe q4-mixed --scales mse --importance {importance}"
        for bits in arguments.target_bits:
            recipes[f"auto {bits}"] = f"--recipe auto --target-bits {bits} --scales mse --importance {importance}"
    return recipes


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face directory")
    parser.add_argument("text", type=Path, help="a text that the model was not trained on")
    parser.add_argument("--split", help="each document ends with this text, and is read by itself")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=1024)
    parser.add_argument("--ours", nargs="+", metavar="'NAME=OPTIONS'", help="rows and options of dist-moe shard")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="TYPE,TYPE", help="llama.cpp's; empty for none")
    parser.add_argument(
        "--calibrate", type=Path, metavar="TEXT", help="a third text: adds q4 with importance, and auto"
    )
    parser.add_argument("--target-bits", type=float, nargs="+", default=[], help="of auto, with --calibrate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", default=sys.executable, help="one that has llama-cpp-python  [default: this]")
    parser.add_argument("--work", type=Path, help="keeps the stores and files  [default: a temporary directory]")
    parser.add_argument("-o", "--format", choices=("md", "json"), default="md")
    return parser.parse_args(words)


def main() -> None:
    """Pack, measure, print."""
    arguments = parse()
    with tempfile.TemporaryDirectory() as directory:
        work = arguments.work or Path(directory)
        work.mkdir(parents=True, exist_ok=True)
        shape = (arguments.window, arguments.stride, arguments.threads, work, arguments.peer_python)
        task = Task(arguments.checkpoint, arguments.text, arguments.split, *shape)
        reference = task.pack("f32", "--quant f32")
        task.base.unlink(missing_ok=True)
        task.measure(reference, "f32")
        rows = list(our_rows(task, recipes_of(arguments, task, reference)))
        if arguments.peers:
            rows += their_rows(task, reference, arguments.peers.split(","))
    print(json.dumps([asdict(row) for row in rows], indent=1) if arguments.format == "json" else table(rows))


if __name__ == "__main__":
    main()
