"""Times `dist-moe shard` on a checkpoint of random bf16 weights with a real model's shape, and prints a table.

    python benchmarks/convert.py --layers 12 --work DIR       # 12 layers of Qwen3-30B-A3B: 16 GB, and room for a store
    python benchmarks/convert.py --layers 2 --threads 1 2 --recipes 'q4 mse=--quant q4 --scales mse' --repeat 3

The checkpoint is written first, a file per layer, and kept in DIR for the next run; stores are removed. Each line is a
process of its own: its seconds (best of --repeat), source bytes per second, bytes of the store, and the largest private
memory that it had (RssAnon of /proc, sampled; pages of mapped files are not private). Whether the source comes from the
disk or from memory is the system's choice; --cold asks it to forget the source before each run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe.checkpoint.safetensors_file import file_layout

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = {
    "q4 absmax": "--quant q4 --scales absmax",
    "q4 mse": "--quant q4 --scales mse",
    "q8": "--quant q8 --scales absmax",
}
CONFIG = Path(__file__).parents[1] / "configs" / "qwen3-30b-a3b.toml"
DEVIATION = 0.02  # of a weight
BLOCK_VALUES = 1 << 25  # all tensors are cuts of one random block: nothing depends on the values
SAMPLE_S = 0.02


@dataclass(frozen=True)
class Run:
    """One conversion."""

    recipe: str
    threads: int
    seconds: float
    source_bytes: int
    store_bytes: int
    private_bytes: int


def tensor_shapes(architecture: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors of each file of the checkpoint: those of no layer, then a file per layer."""
    dim, head_dim = architecture["hidden_size"], architecture["head_dim"]
    q, kv = architecture["num_attention_heads"] * head_dim, architecture["num_key_value_heads"] * head_dim
    hidden, vocabulary = architecture["moe_intermediate_size"], architecture["vocab_size"]
    outside: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, dim), "model.norm.weight": (dim,)}
    if not architecture["tie_word_embeddings"]:
        outside["lm_head.weight"] = (vocabulary, dim)
    yield outside
    for layer in range(architecture["num_hidden_layers"]):
        inside: dict[str, tuple[int, ...]] = {
            "input_layernorm": (dim,),
            "post_attention_layernorm": (dim,),
            "self_attn.q_norm": (head_dim,),
            "self_attn.k_norm": (head_dim,),
            "self_attn.q_proj": (q, dim),
            "self_attn.k_proj": (kv, dim),
            "self_attn.v_proj": (kv, dim),
            "self_attn.o_proj": (dim, q),
            "mlp.gate": (architecture["num_experts"], dim),
        }
        for expert in range(architecture["num_experts"]):
            matrices = {"gate_proj": (hidden, dim), "up_proj": (hidden, dim), "down_proj": (dim, hidden)}
            inside |= {f"mlp.experts.{expert}.{name}": shape for name, shape in matrices.items()}
        yield {f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()}


def write_checkpoint(directory: Path, architecture: dict[str, Any]) -> None:
    """Write config.json, the index last, and the files between."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(architecture))
    random = np.random.default_rng(1)
    block = random.standard_normal(BLOCK_VALUES, np.float32) * np.float32(DEVIATION)
    bits: npt.NDArray[np.uint16] = (block.view(np.uint32) >> 16).astype(np.uint16)
    files = list(tensor_shapes(architecture))
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for name, shapes in zip(names, files, strict=True):
        layout = file_layout({tensor: ("BF16", shape) for tensor, shape in shapes.items()}, {})
        with (directory / name).open("wb") as file:
            file.write(layout.header)
            for tensor, shape in shapes.items():
                file.write(bytes(layout.first_byte[tensor] - file.tell()))
                left = int(np.prod(shape))
                while left:
                    first = int(random.integers(0, BLOCK_VALUES // 2))
                    file.write(bits[first : first + left].data)
                    left -= len(bits[first : first + left])
            file.write(bytes(layout.file_bytes - file.tell()))
    index = {tensor: name for name, shapes in zip(names, files, strict=True) for tensor in shapes}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def source_files(source: Path) -> list[Path]:
    """The weight files."""
    return sorted(source.glob("*.safetensors"))


def forget(source: Path) -> None:
    """Ask the system to drop the source from its memory."""
    for path in source_files(source):
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def private_bytes(process: int) -> int:
    """What a process holds that no file backs; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def convert_once(source: Path, store: Path, recipe: str, options: str, threads: int) -> Run:
    """One conversion; SystemExit if it fails."""
    words = ["shard", str(source), *shlex.split(options), "--threads", str(threads), "-o", str(store), "--quiet"]
    began_s, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([sys.executable, "-m", "dist_moe", *words], stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            peak = max(peak, private_bytes(process.pid))
            time.sleep(SAMPLE_S)
        seconds = time.perf_counter() - began_s
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"dist-moe {shlex.join(words)} failed:\n{errors.read().decode()}")
    source_bytes = sum(path.stat().st_size for path in source_files(source))
    store_bytes = sum(path.stat().st_size for path in store.iterdir())
    shutil.rmtree(store)
    return Run(recipe, threads, seconds, source_bytes, store_bytes, peak)


def table(runs: list[Run], layers: int) -> str:
    """Markdown."""
    lines = [
        f"{layers} layers, {runs[0].source_bytes / 1e9:.2f} GB of bf16",
        "",
        "| recipe | threads | seconds | MB/s of source | store, GB | peak private memory, MB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for run in runs:
        rate, private = run.source_bytes / run.seconds / 1e6, run.private_bytes / 1e6
        lines.append(
            f"| {run.recipe} | {run.threads} | {run.seconds:.1f} | {rate:.0f} | {run.store_bytes / 1e9:.2f} "
            f"| {private:.0f} |"
        )
    return "\n".join(lines)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="a model's .toml  [default: Qwen3-30B-A3B's]")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--recipes", nargs="+", metavar="'NAME=OPTIONS'", help="names, and options of dist-moe shard")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="read the source from the disk each time")
    parser.add_argument("--work", type=Path, help="keeps the checkpoint  [default: a temporary directory]")
    return parser.parse_args(words)


def main() -> None:
    """Write the checkpoint if need be, convert, print."""
    arguments = parse()
    architecture = tomllib.loads(arguments.config.read_text())["architecture"]
    architecture["num_hidden_layers"] = arguments.layers
    recipes = dict(words.split("=", 1) for words in arguments.recipes) if arguments.recipes else RECIPES
    runs: dict[tuple[str, int], Run] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        source = work / f"{arguments.config.stem}-{arguments.layers}-layers"
        if not (source / "model.safetensors.index.json").exists():
            shutil.rmtree(source, ignore_errors=True)
            write_checkpoint(source, architecture)
        for _ in range(arguments.repeat):
            for name, options in recipes.items():
                for threads in arguments.threads:
                    if arguments.cold:
                        forget(source)
                    run = convert_once(source, work / "store", name, options, threads)
                    print(run, file=sys.stderr, flush=True)
                    best = runs.get((name, threads), run)
                    runs[name, threads] = min(best, run, key=lambda run: run.seconds)
    print(table(list(runs.values()), arguments.layers))


if __name__ == "__main__":
    main()
