"""QW3W files as moe.cc's export.py and convert.c write them, from the description of the format alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from helpers.tiny_model import TinyModel

Array = np.ndarray
MODEL = TinyModel(layers=2, dense_layers=(), experts=4)
F = np.float32


def record(name: str, dtype: int, values: Array, group_size: int | None) -> bytes:
    """One record; `group_size` is None in v1."""
    head = struct.pack("<I", len(name.encode())) + name.encode() + struct.pack("<II", dtype, values.ndim)
    tail = b"" if group_size is None else struct.pack("<I", group_size)
    return head + struct.pack(f"<{values.ndim}I", *values.shape) + values.tobytes() + tail


def file_bytes(records: list[bytes], version: int, count: int = 7) -> bytes:
    """A whole file; the count is wrong, as it is in files of quantized tensors."""
    return b"QW3W\0" + bytes([version]) + struct.pack("<I", count) + b"".join(records)


def grouped(values: Array, group: int) -> Array:
    """The flattened values in groups [groups, group], the last one filled with zeros; 0 is a group per row."""
    if not group:
        return values
    flat = values.ravel()
    return np.pad(flat, (0, -len(flat) % group)).reshape(-1, group)


def packed(codes: Array) -> Array:
    """Codes [rows, columns] of 4 bits as bytes, even columns in the low half."""
    codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))).astype(np.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def quantized(name: str, values: Array, kind: str, group: int) -> tuple[list[tuple[str, int, Array]], Array]:
    """A matrix's records (name, dtype, array), and the values that they stand for.

    Args:
        name: Of the tensor.
        values: float32 [rows, columns].
        kind: "q8", "q4" or "q4z", which has zero points.
        group: Weights of the flattened matrix per scale; 0 for rows.
    """
    groups_Gi, size = grouped(values, group), values.size
    if kind == "q4z":
        least_G, most_G = groups_Gi.min(axis=1), groups_Gi.max(axis=1)
        scale_G = np.where((most_G - least_G) / F(15) < 1e-8, F(1), (most_G - least_G) / F(15)).astype(F)
        zero_G = np.clip(np.rint(least_G * 100), -128, 127).astype(np.int8)
        codes_Gi = np.clip(np.rint((groups_Gi - least_G[:, None]) / scale_G[:, None]), 0, 15)
        exact_Gi = codes_Gi.astype(F) * scale_G[:, None] + (zero_G.astype(F) / F(100))[:, None]
    else:
        most = 127 if kind == "q8" else 7
        scale_G = np.maximum(np.abs(groups_Gi).max(axis=1), F(1e-8)) / F(most)
        codes_Gi = np.rint(groups_Gi / scale_G[:, None])
        exact_Gi = codes_Gi.astype(F) * scale_G[:, None]
    codes, exact = (array.ravel()[:size].reshape(values.shape) for array in (codes_Gi, exact_Gi))
    found: list[tuple[str, int, Array]] = [(f"{name}.scale", 0, scale_G)]
    if kind == "q8":
        return [*found, (f"{name}.q8", 2, codes.astype(np.int8))], exact
    if kind == "q4":
        return [*found, (f"{name}.q4", 3, packed(codes + 8))], exact
    return [*found, (f"{name}.q4", 3, packed(codes)), (f"{name}.zero_point", 2, zero_G)], exact


def write_qw3w(
    path: Path, model: TinyModel = MODEL, kind: str = "", group: int = 0, version: int = 2, half: bool = False
) -> dict[str, Array]:
    """Write a model with the config.json that belongs beside it.

    Args:
        path: The file.
        model: Its sizes and weights.
        kind: How the experts are quantized: "q8", "q4", "q4z" or not at all.
        group: Weights per scale; 0 for rows.
        version: 1 or 2.
        half: Write what is not quantized as f16 in place of f32.

    Returns:
        The float32 values that the tensors stand for, under their Hugging Face names.
    """
    by_tensor, values = _records(model, kind, group, version, half)
    path.write_bytes(file_bytes([part for parts in by_tensor.values() for part in parts], version))
    (path.parent / "config.json").write_text(json.dumps(model.config_json()))
    return values


def write_qw3w_directory(
    path: Path, model: TinyModel = MODEL, kind: str = "", group: int = 0, version: int = 1
) -> dict[str, Array]:
    """Write a directory with a file for each tensor; arguments and result as of `write_qw3w`."""
    by_tensor, values = _records(model, kind, group, version, half=False)
    path.mkdir()
    entries: list[dict[str, object]] = []
    for name, parts in by_tensor.items():
        (path / f"{name}.bin").write_bytes(file_bytes(parts, version, count=1))
        shape = list(values[name].shape)
        entries.append({"name": name, "file": f"{name}.bin", "shape": shape, "dtype": "f32", "quant": None})
    manifest = {"model": "tiny", "quant": kind or "none", "tensors": entries}
    (path / "manifest.json").write_text(json.dumps(manifest, indent=2))
    (path / "config.json").write_text(json.dumps(model.config_json()))
    return values


def _records(
    model: TinyModel, kind: str, group: int, version: int, half: bool
) -> tuple[dict[str, list[bytes]], dict[str, Array]]:
    """By tensor its records, and the values that they stand for."""
    by_tensor, values = {}, {}
    for name, weights in model.tensors().items():
        parts = [(name, int(half), weights.astype(np.float16) if half else weights)]
        values[name] = parts[0][2].astype(np.float32)
        told = 0
        if kind and ".experts." in name:
            (parts, values[name]), told = quantized(name, weights, kind, group), group
        by_tensor[name] = [record(part, dtype, array, told if version == 2 else None) for part, dtype, array in parts]
    return by_tensor, values
