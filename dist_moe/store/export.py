"""Chosen tensors of a store, decoded, under the names of Hugging Face: one safetensors file, or a .npy file each."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from dist_moe.checkpoint.safetensors_file import file_layout
from dist_moe.errors import UsageError
from dist_moe.files import NewFile, write_errors
from dist_moe.kernels.formats import WeightFormat
from dist_moe.model_config import ModelConfig
from dist_moe.store.checksum import bytes_of
from dist_moe.store.decoded import DecodedStore, tensor_places

PARTS = ("attn", "mlp", "norms", "router")
_SAFETENSORS, _NPY = ".safetensors", ".npy"
_NORMS = ("attention_norm", "mlp_norm", "q_norm", "k_norm")


@dataclass(frozen=True)
class Selection:
    """What to export; None is all.

    Attributes:
        layers: Which layers; all of them bring the final norm with "norms", too.
        parts: Of each layer, among `PARTS`.
        experts: Of each layer with a router; a dense MLP has but one, which always comes with "mlp".
        lm_head: Whether lm_head comes.
        embedding: Whether the embedding comes.
    """

    layers: tuple[int, ...] | None = None
    parts: tuple[str, ...] = PARTS
    experts: tuple[int, ...] | None = None
    lm_head: bool = False
    embedding: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written: the files, and the tensors in them by their Hugging Face names."""

    files: tuple[Path, ...]
    tensors: tuple[str, ...]
    total_bytes: int


def selected_names(config: ModelConfig, selection: Selection) -> list[str]:
    """The logical names of what is selected, in the order of the forward pass.

    Raises:
        UsageError: A layer or expert does not exist, or nothing is selected.
    """
    _check_numbers("--layer", "layer", selection.layers, config.layers)
    most = max(config.layer_experts(layer) for layer in range(config.layers))
    _check_numbers("--experts", "expert", selection.experts, most)
    names = [name for name in tensor_places(config) if _is_selected(config, selection, name)]
    if not names:
        raise UsageError("this selects no tensor of the model: give --layer with --part, --lm-head or --embedding")
    return names


def export(
    decoded: DecodedStore, names: Sequence[str], output: Path, fmt: WeightFormat, progress: Callable[[int], object]
) -> Exported:
    """Write tensors to a .safetensors file, a .npy file (one tensor), or a directory of .npy files, by the name's end.

    Args:
        decoded: The store.
        names: Logical names.
        output: Where to; files with the same names are replaced, each when its successor is whole.
        fmt: F32 or BF16 (rounded to nearest, ties to even); .npy has no bf16.
        progress: Called with every number of values written.

    Raises:
        UsageError: The output cannot hold that, or cannot be written.
        StoreError: A shard is not here, or a unit is damaged.
    """
    for name in names:
        decoded.require(name)
    files: tuple[Path, ...]
    if output.suffix == _SAFETENSORS:
        files = (_write_safetensors(decoded, names, output, fmt, progress),)
    else:
        files = tuple(
            _write_npy(decoded, name, path, progress)
            for name, path in zip(names, _npy_paths(decoded, names, output, fmt), strict=True)
        )
    return Exported(files, tuple(decoded.tensor(name) for name in names), sum(path.stat().st_size for path in files))


def _is_selected(config: ModelConfig, selection: Selection, name: str) -> bool:
    if name in ("lm_head", "embedding"):
        return selection.lm_head if name == "lm_head" else selection.embedding
    if name == "final_norm":
        return "norms" in selection.parts and selection.layers is None
    _, layer, rest = name.split(".", 2)
    if selection.layers is not None and int(layer) not in selection.layers:
        return False
    if not rest.startswith("experts."):
        part = "norms" if rest in _NORMS else rest if rest == "router" else "attn"
        return part in selection.parts
    chosen = selection.experts is None or config.is_dense(int(layer)) or int(rest.split(".")[1]) in selection.experts
    return "mlp" in selection.parts and chosen


def _check_numbers(option: str, what: str, numbers: tuple[int, ...] | None, count: int) -> None:
    for number in numbers or ():
        if not 0 <= number < count:
            raise UsageError(f"{option} {number}: this model has no {what} {number}; give 0 to {count - 1}, or all")


def _write_safetensors(
    decoded: DecodedStore, names: Sequence[str], path: Path, fmt: WeightFormat, progress: Callable[[int], object]
) -> Path:
    tensors = {decoded.tensor(name): (fmt.label.upper(), decoded.shape(name)) for name in names}
    tags = {"format": "pt", "source": decoded.manifest.source_name, "weights": decoded.manifest.label}
    value_bytes = 4 if fmt == WeightFormat.F32 else 2
    layout = file_layout(tensors, tags, alignment=value_bytes)  # nothing between the tensors
    with NewFile(path) as file:
        file.write(layout.header)
        for name in names:
            for values in _rows(decoded, name, progress):
                file.write(bytes_of(values if fmt == WeightFormat.F32 else to_bf16(values)))
        file.commit()
    return path


def _npy_paths(decoded: DecodedStore, names: Sequence[str], output: Path, fmt: WeightFormat) -> list[Path]:
    if fmt != WeightFormat.F32:
        raise UsageError(f"--dtype {fmt.label}: .npy files have no such type; leave it out, or write .safetensors")
    if output.suffix == _NPY:
        if len(names) > 1:
            raise UsageError(
                f"{output}: a .npy file holds one tensor, but {len(names)} are selected; name a directory for them, or "
                "a .safetensors file"
            )
        return [output]
    with write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    return [output / f"{decoded.tensor(name)}{_NPY}" for name in names]


def _write_npy(decoded: DecodedStore, name: str, path: Path, progress: Callable[[int], object]) -> Path:
    header = io.BytesIO()
    npy_format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": decoded.shape(name)})
    with NewFile(path) as file:
        file.write(header.getvalue())
        for values in _rows(decoded, name, progress):
            file.write(bytes_of(values))
        file.commit()
    return path


def _rows(decoded: DecodedStore, name: str, progress: Callable[[int], object]) -> Iterator[npt.NDArray[np.float32]]:
    """A tensor in C-contiguous runs of whole rows."""
    parts = (part.values for part in decoded.slices(name)) if decoded.is_by_rows(name) else [decoded.whole(name)]
    for values in parts:
        yield np.ascontiguousarray(values, "<f4")
        progress(values.size)


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """The nearest bf16, ties to even, as uint16; infinities and NaNs stay what they are."""
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
    quiet = ((bits >> 16) | 0x40).astype("<u2")
    return np.where(np.isnan(values), quiet, rounded)
