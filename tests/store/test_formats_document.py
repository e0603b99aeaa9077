"""A reader made from docs/formats.md alone, with NumPy and nothing of dist-moe, finds the source's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.demo import demo_model_directory
from dist_moe.kernels.formats import ScaleChoice, WeightFormat
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

    def _read_shard(self, path: Path, shard: dict[str, Any]) -> None:
        tensors = read_tensors(path, 64)
        runs = {"vocabulary": shard["vocabulary"]}
        for part in shard["chunks"]:
            for layer in range(part["first_layer"], part["stop_layer"]):
                kinds = {"heads": shard["heads"], "kv_heads": shard["kv_heads"], "chunks": part["runs"]}
                runs |= {f"layers.{layer}.{kind}": found for kind, found in kinds.items()}
        for name, found in runs.items():
            for row, index in enumerate(indices(found)):
                unit = tensors[name][row]
                assert xxhash.xxh3_64_intdigest(unit.tobytes()) == tensors[name + ".xxh3"][row]
                self.units[name, index] = unit

    def matrices(self, name: str, index: int, *shapes: tuple[int, int], groups: tuple[int, ...] = ()) -> list[Array]:
        """The matrices of a unit, which they fill to its last byte."""
        unit, found = self.units[name, index], []
        for number, (rows, columns) in enumerate(shapes):
            group = groups[number] if groups else self.group
            values, unit = unpack(unit, rows, columns, self.manifest["weights"], group)
            found.append(values)
        assert len(unit) == 0
        return found

    def attention(self, layer: int) -> dict[str, Array]:
        D, P = self.model["model_dim"], self.model["head_dim"]
        own = min(self.group, P) if self.group else P
        heads = [
            self.matrices(f"layers.{layer}.heads", h, (P, D), (D, P), groups=(self.group, own))
            for h in range(self.model["heads"])
        ]
        kv_heads = [self.matrices(f"layers.{layer}.kv_heads", g, (P, D), (P, D)) for g in range(self.model["kv_heads"])]
        return {
            "q": np.concatenate([q for q, _ in heads]),
            "o": np.concatenate([o for _, o in heads], axis=1),
            "k": np.concatenate([k for k, _ in kv_heads]),
            "v": np.concatenate([v for _, v in kv_heads]),
        }

    def expert(self, layer: int, expert: int) -> list[Array]:
        D, F = self.model["model_dim"], up(self.model["expert_hidden"], 32)
        width = next(w for w in (128, 96, 64, 32) if F % w == 0 and w % max(32, self.group) == 0)
        chunks = range(expert * (F // width), (expert + 1) * (F // width))
        name, shapes = f"layers.{layer}.chunks", ((width, D), (width, D), (D, width))
        gate, up_, down = zip(*(self.matrices(name, chunk, *shapes) for chunk in chunks), strict=True)
        return [np.concatenate(gate), np.concatenate(up_), np.concatenate(down, axis=1)]

    def lm_head(self) -> Array:
        D, V = self.model["model_dim"], self.model["vocabulary"]
        blocks = [self.matrices("vocabulary", b, (128, D))[0] for b in range(up(V, 128) // 128)]
        return np.concatenate(blocks)[:V]


def text_checksum(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


def absmax(weights: Array, fmt: str, group: int) -> Array:
    """What a store keeps of a matrix, by the document's formulas."""
    if fmt in ("f32", "bf16"):  # the demo is bf16
        return weights
    group = group or weights.shape[1]
    found = np.empty_like(weights)
    for first in range(0, weights.shape[1], group):
        w = weights[:, first : first + group]
        largest = np.take_along_axis(w, np.abs(w).argmax(axis=1)[:, None], 1)
        exact = np.abs(largest) / np.float32(127) if fmt == "q8" else largest / np.float32(-8)
        d = exact.astype(np.float16).astype(np.float32)
        low, high = (-127, 127) if fmt == "q8" else (-8, 7)
        q = np.clip(np.rint(np.divide(w, d, out=np.zeros_like(w), where=d != 0)), low, high)
        found[:, first : first + group] = d * q
    return found


@pytest.mark.parametrize(
    ("fmt", "group", "nodes"), [("q4", 32, 1), ("q4", 0, 2), ("q8", 64, 3), ("bf16", 32, 1), ("f32", 32, 2)]
)
def test_a_reader_written_from_the_document(tmp_path: Path, fmt: str, group: int, nodes: int) -> None:
    options = {"group_size": group, "nodes": nodes, "experts": "sliced" if nodes == 3 else "whole"}
    scales = ScaleChoice.ABSMAX
    run_convert(
        Checkpoint.open(demo_model_directory()), tmp_path, format=WeightFormat.parse(fmt), scales=scales, **options
    )
    store = DocumentedStore(tmp_path)
    source = read_tensors(demo_model_directory() / "model.safetensors")
    manifest, model = store.manifest, store.model
    assert (manifest["weights"], manifest["group_size"], manifest["format_version"]) == (fmt, group, 1)
    embedding = source["model.embed_tokens.weight"]
    assert np.array_equal(store.common["embedding"], embedding)
    assert np.array_equal(store.lm_head(), absmax(embedding, fmt, group))
    assert np.array_equal(store.common["final_norm"], source["model.norm.weight"])
    layer = model["layers"] - 1
    prefix = f"model.layers.{layer}."
    for key, found in store.attention(layer).items():
        own = (min(group, model["head_dim"]) if group else model["head_dim"]) if key == "o" else group
        assert np.array_equal(found, absmax(source[f"{prefix}self_attn.{key}_proj.weight"], fmt, own)), key
    assert np.array_equal(store.common[f"layers.{layer}.q_norm"], source[f"{prefix}self_attn.q_norm.weight"])
    shape = (model["experts"], model["model_dim"])
    router, rest = unpack(store.common[f"layers.{layer}.router"], *shape, manifest["router"], 0)
    assert np.array_equal(router, source[f"{prefix}mlp.gate.weight"])
    assert len(rest) == 0
    expert = model["experts"] - 1
    for key, found in zip(("gate", "up", "down"), store.expert(layer, expert), strict=True):
        assert np.array_equal(found, absmax(source[f"{prefix}mlp.experts.{expert}.{key}_proj.weight"], fmt, group)), key
