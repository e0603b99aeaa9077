"""Mutated inputs for the parsers of files that others wrote: each is read, or refused with one planned sentence.

    python tests/helpers/fuzz.py gguf --count 10000 --seed 1

Fails on any other exception, on an input that takes more than SECONDS, and on one that needs more than MORE_BYTES of
address space. What failed is kept as a file, whose name is printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_moe.checkpoint.source import open_source
from dist_moe.errors import DistMoeError
from dist_moe.store.calibration import Calibration, LayerMoments, moment_shapes
from dist_moe.store.calibration_file import read_calibration, require_model, write_calibration
from dist_moe.store.checksum import checksum_text
from dist_moe.store.layout import weight_files, weight_layout
from dist_moe.store.manifest import MANIFEST_NAME
from dist_moe.store.plan import StoreOptions, plan_store
from dist_moe.store.reader import Store
from dist_moe.store.recipe_file import find_recipe, parse_recipe
from helpers.tiny_gguf import write_gguf
from helpers.tiny_model import TinyModel
from helpers.tiny_qw3w import write_qw3w
from helpers.tiny_store import run_convert

SECONDS = 10
MORE_BYTES = 1 << 29
SMALL = TinyModel(layers=1, dense_layers=(), experts=2, experts_per_token=1, expert_hidden=32, vocabulary=40)
MIXED = 'format = "q4"\n[[rule]]\nexperts = "1"\nformat = "q8"\n[[rule]]\nkind = "o"\nformat = "bf16"\n'
# Numbers that programs stumble over.
EXTREMES = (
    0,
    1,
    2,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    10**5,
    10**6,
    10**7,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**64 - 1,
)
STRANGE: tuple[Any, ...] = (None, True, "", "x", -1, 0.5, 1e308, [], {}, [[]], [1, 2], {"a": 1}, *EXTREMES)
Random = np.random.Generator
Mutate = Callable[[Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """A parser: a whole file, how to spoil it, where it stands, and what is done with it."""

    whole: bytes
    mutate: Mutate
    path: Path
    use: Callable[[], None]


class TooSlowError(Exception):
    """An input took longer than SECONDS."""


def main() -> int:
    """Fuzz the parsers that the command line names; the exit code is 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="|".join(TARGETS), help="[default: all]")
    parser.add_argument("--count", type=int, default=10_000, help="inputs per parser  [default: 10000]")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    failed = [name for name in arguments.targets or TARGETS if not fuzz(name, arguments.count, arguments.seed)]
    return 1 if failed else 0


def fuzz(name: str, count: int, seed: int) -> bool:
    """Feed one parser; prints what came of it."""
    directory = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    try:
        target = TARGETS[name](directory)
        target.use()  # whole, it is read, and everything is imported
        outcomes = {"read": 0, "refused": 0}
        for index in range(count):
            data = target.mutate(np.random.default_rng([seed, index]), target.whole)
            problem = try_input(target, data, outcomes)
            if problem:
                kept = Path(tempfile.gettempdir()) / f"fuzz-{name}-{seed}-{index}"
                kept.write_bytes(data)
                print(f"{name}: input {index} of seed {seed}, kept as {kept}:\n{problem}", flush=True)
                return False
    finally:
        shutil.rmtree(directory)
    print(f"{name}: {count} inputs of seed {seed}: {outcomes['read']} read, {outcomes['refused']} refused", flush=True)
    return True


def try_input(target: Target, data: bytes, outcomes: dict[str, int]) -> str | None:
    """What is wrong with how the parser took an input; None if nothing is."""
    target.path.write_bytes(data)
    try:
        with bounds():
            target.use()
        outcomes["read"] += 1
    except DistMoeError as error:
        outcomes["refused"] += 1
        text = str(error)
        if error.exit_code != 2 or "\n" in text or (str(target.path.parent) not in text and not text.startswith("--")):
            return f"the refusal is not one sentence with a path and exit code 2: {text}"
    except BaseException:
        return traceback.format_exc()
    return None


@contextmanager
def bounds() -> Iterator[None]:
    """Bounds on time and address space."""

    def too_slow(*_: object) -> None:
        raise TooSlowError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_BYTES, limits[1]))
    signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def spoil_bytes(random: Random, whole: bytes, places: np.ndarray) -> bytes:
    """Change, cut, double or lengthen some bytes at or near the given places."""
    data = bytearray(whole)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        at, width = int(random.choice(places)), int(random.choice([1, 1, 2, 4, 8]))
        kind = random.integers(0, 8)
        if kind < 3:
            data[at : at + width] = random.bytes(width)
        elif kind < 6:
            value = int(random.choice(np.array(EXTREMES, object))) % 2 ** (8 * width)
            data[at : at + width] = value.to_bytes(width, "little")
        elif kind == 6:
            data[at:at] = data[at : at + int(random.integers(1, 64))]
        else:
            del data[at : at + int(random.integers(1, 64))]
    return bytes(data[: random.integers(0, len(data))] if random.integers(0, 10) == 0 else data)


def spoil_json(random: Random, value: Any) -> Any:
    """Change a value somewhere in a JSON tree, in place."""
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        parents = list(containers(value))
        if not parents:
            break
        parent = parents[random.integers(0, len(parents))]
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        key, kind = keys[random.integers(0, len(keys))], random.integers(0, 5)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent[key], int):
            parent[key] += int(random.integers(-2, 3)) or 1
        elif kind == 2:
            donor = parents[random.integers(0, len(parents))]
            parent[key] = json.loads(json.dumps(donor))
        else:
            parent[key] = STRANGE[random.integers(0, len(STRANGE))]
    return value


def spoil_header(random: Random, data: bytes) -> bytes:
    """Spoil the header of a safetensors file: its bytes, or its JSON under a fitting length."""
    end = 8 + int.from_bytes(data[:8], "little")
    if random.integers(0, 2):
        return spoil_bytes(random, data, np.arange(end))
    text = json.dumps(spoil_json(random, json.loads(data[8:end]))).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def containers(value: Any) -> Iterator[Any]:
    """Every object and list with something in it."""
    if isinstance(value, (dict, list)) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


def look_into(path: Path) -> None:
    """Open a model, plan its store and read a little of it."""
    source = open_source(path)
    source.text_files()
    source.fingerprint()
    plan = plan_store(source, StoreOptions())
    for name in weight_files(plan):
        weight_layout(plan, name)
    for name in source.names()[:20]:
        source.read(name, slice(1, 3))


def gguf(directory: Path) -> Target:
    """A GGUF file; what comes after its header is weights."""
    path = directory / "model.gguf"
    texts = {"general.name": "tiny", "general.tags": ["one", "two"], "general.numbers": [1, 2, 3]}
    write_gguf(path, SMALL, changes=texts, types={"blk.0.attn_k.weight": "Q4_1", "blk.0.attn_q.weight": "BF16"})
    whole = path.read_bytes()
    places = np.arange(whole.rindex(b"output_norm.weight") + 64)
    return Target(whole, lambda random, data: spoil_bytes(random, data, places), path, lambda: look_into(path))


def qw3w(directory: Path) -> Target:
    """A QW3W file; a record's head stands before its weights, v2's group size after them."""
    path = directory / "model.bin"
    values = write_qw3w(path, SMALL, "q4z", 32)
    whole = path.read_bytes()
    parts = [name + part for name in values for part in ("", ".scale", ".q4", ".zero_point")]
    heads = [whole.find(struct.pack("<I", len(part)) + part.encode()) for part in parts]
    found = [(first, len(part)) for first, part in zip(heads, parts, strict=True) if first >= 0]
    places = np.concatenate([np.arange(10), *(np.arange(first - 4, first + length + 24) for first, length in found)])
    return Target(whole, lambda random, data: spoil_bytes(random, data, places), path, lambda: look_into(path))


def safetensors(directory: Path) -> Target:
    """The safetensors file of a Hugging Face directory: its bytes, or its JSON under a fitting length."""
    path = SMALL.write(directory) / "model.safetensors"
    return Target(path.read_bytes(), spoil_header, path, lambda: look_into(directory))


def config(directory: Path) -> Target:
    """The config.json of a Hugging Face directory."""
    path = SMALL.write(directory) / "config.json"

    def mutate(random: Random, data: bytes) -> bytes:
        if random.integers(0, 4) == 0:
            return spoil_bytes(random, data, np.arange(len(data)))
        return json.dumps(spoil_json(random, json.loads(data))).encode()

    return Target(path.read_bytes(), mutate, path, lambda: look_into(directory))


def manifest(directory: Path) -> Target:
    """The manifest of a store: its bytes, or its JSON under a checksum that fits."""
    return _manifest(directory, 'format = "q4"')


def mixed_manifest(directory: Path) -> Target:
    """The same of a store whose matrices have several formats."""
    return _manifest(directory, MIXED)


def _manifest(directory: Path, recipe: str) -> Target:
    source = open_source(SMALL.write(directory / "model"))
    path = directory / "store" / MANIFEST_NAME
    formats = parse_recipe(recipe, "").formats(source.config)
    run_convert(source, path.parent, nodes=2, formats=formats)

    def mutate(random: Random, data: bytes) -> bytes:
        if random.integers(0, 4) == 0:
            return spoil_bytes(random, data, np.arange(len(data)))
        body = spoil_json(random, {key: item for key, item in json.loads(data).items() if key != "checksum"})
        checksum = checksum_text((json.dumps(body, indent=1) + "\n").encode())
        return (json.dumps({**body, "checksum": checksum}, indent=1) + "\n").encode()

    def use() -> None:
        store = Store.open(path.parent)
        for kind in ("head", "kv_head", "chunk", "vocabulary"):
            store.unit(kind, 0, 0)

    return Target(path.read_bytes(), mutate, path, use)


def recipe(directory: Path) -> Target:
    """A recipe, applied to a model."""
    model, path = open_source(SMALL.write(directory / "model")).config, directory / "recipe.toml"
    text = MIXED + 'regex = "layers.[0-9]+[.]o"\n[[rule]]\nlayers = "0-"\nkind = ["q", "experts"]\ngroup = 32\n'
    path.write_text(text)
    places = np.arange(len(text))
    return Target(
        text.encode(),
        lambda random, data: spoil_bytes(random, data, places),
        path,
        lambda: [find_recipe(str(path)).formats(model)].clear(),
    )


def calibration(directory: Path) -> Target:
    """A calibration: its bytes, or its header's JSON under a fitting length."""
    path, config = directory / "a.calibration", open_source(SMALL.write(directory / "model")).config
    layers = [
        LayerMoments(
            **{kind: np.ones(shape) for kind, shape in moment_shapes(config, 0).items() if kind != "tokens_E"},
            tokens_E=np.ones(config.experts, np.int64),
        )
    ]
    write_calibration(path, Calibration("m", "f", ("t",), 1, tuple(layers), np.ones(config.model_dim), np.ones(7), 1))
    return Target(
        path.read_bytes(), spoil_header, path, lambda: require_model(path, read_calibration(path), config, "m", "f")
    )


TARGETS = {
    "safetensors": safetensors,
    "config": config,
    "gguf": gguf,
    "qw3w": qw3w,
    "manifest": manifest,
    "mixed-manifest": mixed_manifest,
    "recipe": recipe,
    "calibration": calibration,
}

if __name__ == "__main__":
    sys.exit(main())
