"""A reader made from docs/formats.md alone, with NumPy and nothing of dist-moe, finds the source's weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.demo import demo_model_directory
from dist_moe.kernels.formats import MatrixFormat, ScaleChoice, WeightFormat
from dist_moe.store.formats import LayerFormats, ModelFormats
from helpers.tiny_store import run_convert

Array = npt.NDArray[Any]


def read_tensors(path: Path, alignment: int = 1) -> dict[str, Array]:
    """The tensors of a safetensors file; BF16 becomes float32."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    types = {"U8": "u1", "U64": "<u8", "F32": "<f4", "BF16": "<u2"}
    found = {}
    for name, entry in header.items():
        first, end = (8 + length + offset for offset in entry["data_offsets"])
        values = np.frombuffer(data[first:end], types[entry["dtype"]]).reshape(entry["shape"])
        assert first % alignment == 0 or name.startswith("__padding_")
        found[name] = widen(values) if entry["dtype"] == "BF16" else values
    return found


def widen(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def up(x: int, n: int) -> int:
    return -(-x // n) * n


def unpack(unit: Array, rows: int, columns: int, fmt: str, group: int) -> tuple[Array, Array]:
    """The float32 values [rows, columns] at the start of a unit, and the bytes behind them."""
    tiles = up(rows, 16) // 16
    if fmt in ("f32", "bf16"):
        size = 4 if fmt == "f32" else 2
        end = tiles * up(columns * 16 * size, 64)
        parts = unit[:end].reshape(tiles, -1)[:, : columns * 16 * size].copy()
        values = parts.view("<f4") if fmt == "f32" else widen(parts.view("<u2"))
        return values.reshape(tiles, columns, 16).swapaxes(1, 2).reshape(-1, columns)[:rows], unit[end:]
    groups = -(-columns // group) if group else 1
    scale_bytes, blocks = up(groups * 16 * 2, 64), up(columns, 32) // 32
    vectors = 8 if fmt == "q8" else 4
    end = tiles * (scale_bytes + blocks * vectors * 64)
    parts = unit[:end].reshape(tiles, -1)
    scales = parts[:, : groups * 32].copy().view("<f2").reshape(tiles, groups, 16).astype(np.float32)
    codes = parts[:, scale_bytes:].reshape(tiles, blocks, vectors, 16, 4)  # vector j, row r, byte b
    found = np.zeros((tiles * 16, blocks * 32), np.float32)
    for t in range(tiles):
        for g in range(blocks):
            for j in range(vectors):
                at = slice(32 * g + 4 * j, 32 * g + 4 * j + 4)
                code = codes[t, g, j].astype(np.int32)
                if fmt == "q8":
                    found[16 * t : 16 * t + 16, at] = code - 128
                    continue
                found[16 * t : 16 * t + 16, at] = (code & 15) - 8
                found[16 * t : 16 * t + 16, at.start + 16 : at.stop + 16] = (code >> 4) - 8
    for column in range(columns):
        found[:, column] *= scales[:, column // group if group else 0].reshape(-1)
    return found[:rows, :columns], unit[end:]


def indices(runs: list[list[int]]) -> list[int]:
    return [index for first, stop in runs for index in range(first, stop)]


class DocumentedStore:
    """A store as the document says."""

    def __init__(self, directory: Path) -> None:
        text = (directory / "manifest.json").read_text()
        self.manifest = json.loads(text)
        self.model, self.group = self.manifest["model"], self.manifest["group_size"]
        body = {key: value for key, value in self.manifest.items() if key != "checksum"}
        assert text_checksum(json.dumps(body, indent=1) + "\n") == self.manifest["checksum"]
        for file in self.manifest["files"]:
            data = (directory / file["name"]).read_bytes()
            assert (len(data), xxhash.xxh3_64_hexdigest(data)) == (file["file_bytes"], file["checksum"])
            assert xxhash.xxh3_64_hexdigest(data[: file["header_bytes"]]) == file["header_checksum"]
        self.common = read_tensors(directory / "common.safetensors", 64)
        self.units: dict[tuple[str, int], Array] = {}
        count = self.manifest["nodes"]
        for number, shard in enumerate(self.manifest["shards"], 1):
            self._read_shard(directory / f"shard-{number:05}-of-{count:05}.safetensors", shard)

    def format(self, key: str, layer: int, expert: int = 0) -> tuple[str, int]:
        """A matrix's format and group, that of o as it counts."""
        label = f"{self.manifest['weights']}g{self.group}"
        if "formats" in self.manifest:
            formats = self.manifest["formats"]
            found = next(part for part in formats["layers"] if part["first_layer"] <= layer < part["stop_layer"])
            found = {**found, "lm_head": formats["lm_head"]}
            label = found["gate_up" if key in ("gate", "up") else key]
            if key in ("gate", "up", "down"):
                runs = [run.split("*") for run in label.split(",")]
                label = [name for count, name in runs for _ in range(int(count))][expert]
        fmt, _, digits = label.partition("g")
        group = int(digits or 0)
        return fmt, (min(group, self.model["head_dim"]) if group else self.model["head_dim"]) if key == "o" else group

    def _tensor(self, kind: str, layer: int, expert: int) -> str:
        if self.manifest["format_version"] < 4:
            return kind
        keys = {"heads": "qo", "kv_heads": "kv", "chunks": ("gate", "up", "down"), "vocabulary": ("lm_head",)}
        formats = [self.format(key, layer, expert) for key in keys[kind.split(".")[-1]]]
        labels = [f"{fmt}g{group}" if fmt in ("q8", "q4") else fmt for fmt, group in formats]
        return f"{kind}.{'-'.join(dict.fromkeys(labels))}"

    def _read_shard(self, path: Path, shard: dict[str, Any]) -> None:
        tensors, rows = read_tensors(path, 64), Counter[str]()
        for index in indices(shard["vocabulary"]):
            self._take(tensors, rows, "vocabulary", 0, 0, index)
        for part in shard["chunks"]:
            for layer in range(part["first_layer"], part["stop_layer"]):
                for kind, runs in (
                    ("heads", shard["heads"]),
                    ("kv_heads", shard["kv_heads"]),
                    ("chunks", part["runs"]),
                ):
                    for index in indices(runs):
                        expert = index // self.chunks if kind == "chunks" else 0
                        self._take(tensors, rows, f"layers.{layer}.{kind}", layer, expert, index)
        packed = {name for name in tensors if not name.startswith("__") and not name.endswith(".xxh3")}
        assert {name: len(tensors[name]) for name in packed} == rows

    def _take(
        self, tensors: dict[str, Array], rows: Counter[str], kind: str, layer: int, expert: int, index: int
    ) -> None:
        """The next row of the tensor that has this unit."""
        name = self._tensor(kind, layer, expert)
        unit, rows[name] = tensors[name][rows[name]], rows[name] + 1
        assert xxhash.xxh3_64_intdigest(unit.tobytes()) == tensors[name + ".xxh3"][rows[name] - 1]
        self.units[kind, index] = unit

    def matrices(self, kind: str, index: int, layer: int, *parts: tuple[str, int, int], expert: int = 0) -> list[Array]:
        """The matrices of a unit, which they fill to its last byte."""
        unit, found = self.units[kind, index], []
        for key, rows, columns in parts:
            values, unit = unpack(unit, rows, columns, *self.format(key, layer, expert))
            found.append(values)
        assert len(unit) == 0
        return found

    @property
    def width(self) -> int:
        hidden = up(self.model["expert_hidden"], 32)
        return next(w for w in (128, 96, 64, 32) if hidden % w == 0 and w % max(32, self.group) == 0)

    @property
    def chunks(self) -> int:
        return up(self.model["expert_hidden"], 32) // self.width

    def attention(self, layer: int) -> dict[str, Array]:
        D, P, name = self.model["model_dim"], self.model["head_dim"], f"layers.{layer}."
        heads = [self.matrices(name + "heads", h, layer, ("q", P, D), ("o", D, P)) for h in range(self.model["heads"])]
        kv_heads = [
            self.matrices(name + "kv_heads", g, layer, ("k", P, D), ("v", P, D)) for g in range(self.model["kv_heads"])
        ]
        return {
            "q": np.concatenate([q for q, _ in heads]),
            "o": np.concatenate([o for _, o in heads], axis=1),
            "k": np.concatenate([k for k, _ in kv_heads]),
            "v": np.concatenate([v for _, v in kv_heads]),
        }

    def expert(self, layer: int, expert: int) -> dict[str, Array]:
        D, w, name = self.model["model_dim"], self.width, f"layers.{layer}.chunks"
        parts = (("gate", w, D), ("up", w, D), ("down", D, w))
        numbers = range(expert * self.chunks, (expert + 1) * self.chunks)
        chunks = [self.matrices(name, chunk, layer, *parts, expert=expert) for chunk in numbers]
        gate, up_, down = zip(*chunks, strict=True)
        return {"gate": np.concatenate(gate), "up": np.concatenate(up_), "down": np.concatenate(down, axis=1)}

    def lm_head(self) -> Array:
        D, V = self.model["model_dim"], self.model["vocabulary"]
        blocks = [self.matrices("vocabulary", b, 0, ("lm_head", 128, D))[0] for b in range(up(V, 128) // 128)]
        return np.concatenate(blocks)[:V]


def text_checksum(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


LIMITS = {"q8": (-127, 127), "q4": (-8, 7)}
CANDIDATES = {
    "q4": (-8, -8.375, -7.75, -8.125, -7.25, -8.625, -6.875, -9),
    "q8": (126, 125, 124, 123, 122, 121, 120, 127.25),
}


def largest(w: Array, fmt: str) -> Array:
    """w* of each row; of q8 its magnitude."""
    found = np.take_along_axis(w, np.abs(w).argmax(axis=1)[:, None], 1)
    return np.abs(found) if fmt == "q8" else found


def f16(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float32)


def absmax(w: Array, fmt: str) -> Array:
    return f16(largest(w, fmt) / np.float32(127 if fmt == "q8" else -8))


def fma_sums(left: Array, right: Array) -> Array:
    """The sum over columns in order, each product added exactly and rounded once."""
    total = np.zeros((len(left), 1), np.float32)
    for a, b in zip(left.T.astype(np.float64), right.T, strict=True):
        total = (total + (a * b)[:, None]).astype(np.float32)
    return total


def mse(w: Array, fmt: str) -> Array:
    def fitted(inverse: Array) -> tuple[Array, Array, Array]:
        q = np.rint(np.clip(w * inverse, *map(np.float32, LIMITS[fmt])))
        products = fma_sums(q, w)
        return q, products, products / fma_sums(q, q)

    start = absmax(w, fmt)
    gain, s = np.zeros_like(start), start.copy()
    for k in CANDIDATES[fmt]:
        _, products, scale = fitted(np.float32(1) / largest(w, fmt) * np.float32(k))
        better = products * scale > gain
        gain, s = np.where(better, products * scale, gain), np.where(better, scale, s)

    def error(d: Array, q: Array) -> Array:
        off = (w.astype(np.float64) - d.astype(np.float64) * q).astype(np.float32)
        return fma_sums(off, off)

    best, least = start, error(start, fitted(np.float32(1) / start)[0])
    for _ in range(2):
        d = f16(s)
        q, _, s = fitted(np.float32(1) / d)
        better = error(d, q) < least
        best, least = np.where(better, d, best), np.where(better, error(d, q), least)
    return best


def stored(weights: Array, fmt: str, group: int, scales: Callable[[Array, str], Array] = absmax) -> Array:
    """What a store keeps of a matrix of bf16 values, by the document's formulas."""
    if fmt in ("f32", "bf16"):
        return weights
    found, group = np.empty_like(weights), group or weights.shape[1]
    for first in range(0, weights.shape[1], group):
        w = weights[:, first : first + group]
        d = scales(w, fmt)
        q = np.clip(np.rint(np.divide(w, d, out=np.zeros_like(w), where=d != 0)), *LIMITS[fmt])
        found[:, first : first + group] = d * q
    return found


def check(store: DocumentedStore, experts: list[int], scales: Callable[[Array, str], Array] = absmax) -> None:
    """Every kind of tensor of the last layer, and what stands in no layer."""
    source = read_tensors(demo_model_directory() / "model.safetensors")
    model, layer = store.model, store.model["layers"] - 1
    prefix, embedding = f"model.layers.{layer}.", source["model.embed_tokens.weight"]
    assert np.array_equal(store.common["embedding"], embedding)
    assert np.array_equal(store.lm_head(), stored(embedding, *store.format("lm_head", 0), scales))
    assert np.array_equal(store.common["final_norm"], source["model.norm.weight"])
    assert np.array_equal(store.common[f"layers.{layer}.q_norm"], source[f"{prefix}self_attn.q_norm.weight"])
    for key, found in store.attention(layer).items():
        expected = stored(source[f"{prefix}self_attn.{key}_proj.weight"], *store.format(key, layer), scales)
        assert np.array_equal(found, expected), key
    shape = (model["experts"], model["model_dim"])
    router, rest = unpack(store.common[f"layers.{layer}.router"], *shape, store.manifest["router"], 0)
    assert np.array_equal(router, source[f"{prefix}mlp.gate.weight"])
    assert len(rest) == 0
    for expert in experts:
        for key, found in store.expert(layer, expert).items():
            original = source[f"{prefix}mlp.experts.{expert}.{key}_proj.weight"]
            assert np.array_equal(found, stored(original, *store.format(key, layer, expert), scales)), key


@pytest.mark.parametrize(
    ("fmt", "group", "nodes"), [("q4", 32, 1), ("q4", 0, 2), ("q8", 64, 3), ("bf16", 32, 1), ("f32", 32, 2)]
)
def test_a_reader_written_from_the_document(tmp_path: Path, fmt: str, group: int, nodes: int) -> None:
    options = {"group_size": group, "nodes": nodes, "experts": "sliced" if nodes == 3 else "whole"}
    run_convert(
        Checkpoint.open(demo_model_directory()),
        tmp_path,
        format=WeightFormat.parse(fmt),
        scales=ScaleChoice.ABSMAX,
        **options,
    )
    store = DocumentedStore(tmp_path)
    assert (store.manifest["weights"], store.group, store.manifest["format_version"]) == (fmt, group, 1)
    check(store, [store.model["experts"] - 1])


@pytest.mark.parametrize("fmt", ["q4", "q8"])
def test_scales_of_least_error_follow_from_the_document(tmp_path: Path, fmt: str) -> None:
    source = Checkpoint.open(demo_model_directory())
    run_convert(source, tmp_path, format=WeightFormat.parse(fmt), scales=ScaleChoice.MSE)
    store = DocumentedStore(tmp_path)
    assert (store.manifest["format_version"], store.manifest["scales"]) == (3, "mse")
    check(store, [0], mse)


def test_a_store_of_several_formats(tmp_path: Path) -> None:
    source = Checkpoint.open(demo_model_directory())
    bf16, q8, q8_64 = (MatrixFormat(WeightFormat.BF16, 0), *(MatrixFormat(WeightFormat.Q8, g) for g in (32, 64)))
    q4, q4_64 = (MatrixFormat(WeightFormat.Q4, g) for g in (32, 64))
    experts = source.config.experts
    gate_up = tuple(q8_64 if expert % 3 == 0 else q4 for expert in range(experts))
    layer = LayerFormats(q8, bf16, q8_64, q4_64, gate_up, (q4_64,) * experts)
    formats = ModelFormats((layer,) * source.config.layers, q8)
    run_convert(source, tmp_path, formats=formats, group_size=64, nodes=2, scales=ScaleChoice.ABSMAX)
    store = DocumentedStore(tmp_path)
    assert (store.manifest["weights"], store.group, store.manifest["format_version"]) == ("q4-mixed", 64, 4)
    check(store, [0, 1, experts - 1])
