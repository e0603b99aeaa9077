"""The file of `dist-moe calibrate`: a safetensors file of float64 sums and int64 counts; its metadata say of what.

Tensors `layers.<n>.input`, `.output`, `.experts`, `.hidden`, `.tokens`, `.mass`, `.residual`,
then `final` and `sensitive`; see `LayerMoments`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe import files
from dist_moe.checkpoint.safetensors_file import SafetensorsFile, file_layout
from dist_moe.errors import CheckpointError, UsageError
from dist_moe.files import NewFile
from dist_moe.model_config import ModelConfig
from dist_moe.store.calibration import Calibration, LayerMoments, group_count, merge, moment_shapes
from dist_moe.store.checksum import checksum_text

FORMAT = "dist-moe calibration"
FORMAT_VERSION = 1
_MAKE_ONE = "make one with dist-moe calibrate TEXT -m STORE -o FILE"
_KINDS = [field.name for field in fields(LayerMoments)]


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration, whole or not at all; equal calibrations give equal bytes.

    Raises:
        UsageError: The file cannot be written.
    """
    arrays = _arrays(calibration)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "model": calibration.model,
        "fingerprint": calibration.fingerprint,
        "texts": json.dumps(calibration.texts, ensure_ascii=False),
        "tokens": str(calibration.tokens),
        "sensitive_tokens": str(calibration.sensitive_tokens),
        "checksum": _checksum(arrays),
    }
    tensors = {name: (_dtype(array), array.shape) for name, array in arrays.items()}
    layout = file_layout(tensors, metadata, alignment=8)  # all values have 8 bytes, so nothing lies between
    with NewFile(path) as file:
        file.write(layout.header)
        for array in arrays.values():
            file.write(_bytes(array))
        file.commit()


def read_calibration(path: Path) -> Calibration:
    """Read a calibration; whether it is of a certain model, `require_model` says.

    Raises:
        UsageError: There is no such file, or it is something else, damaged or of another version.
    """
    if not files.is_file(path):
        raise UsageError(f"{path}: expected a calibration, but there is no such file: {_MAKE_ONE}")
    try:
        stored = SafetensorsFile(path)
    except CheckpointError as error:
        raise UsageError(f"{path}: expected a calibration, but it is none, or damaged ({error}): {_MAKE_ONE}") from None
    metadata = stored.metadata
    if metadata.get("format") != FORMAT:
        raise UsageError(f"{path}: a safetensors file, but not a calibration: {_MAKE_ONE}")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise UsageError(
            f"{path}: a calibration of version {metadata.get('format_version')!r}, expected {FORMAT_VERSION}: "
            "make it again with this version of dist-moe"
        )
    arrays = {name: np.array(stored.raw(name)) for name in stored.names()}
    try:
        if _checksum(arrays) != metadata["checksum"]:
            raise ValueError("its checksum does not fit its bytes")
        return _from_arrays(metadata, arrays)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path}: the calibration is damaged ({error}): {_MAKE_ONE}") from None


def require_model(path: Path, calibration: Calibration, config: ModelConfig, name: str, fingerprint: str) -> None:
    """Refuse the calibration of another model.

    Raises:
        UsageError: Its model differs in fingerprint, or (a damaged file) in sizes.
    """
    if calibration.fingerprint != fingerprint:
        raise UsageError(
            f"{path}: is a calibration of {calibration.model} (fingerprint {calibration.fingerprint[:12]}), not of "
            f"{name} ({fingerprint[:12]}): calibrate a store that was made from the same files"
        )
    if len(calibration.layers) != config.layers:
        raise UsageError(f"{path}: has {len(calibration.layers)} layers, the model has {config.layers}: {_MAKE_ONE}")
    for layer, moments in enumerate(calibration.layers):
        for kind, shape in moment_shapes(config, layer).items():
            found = getattr(moments, kind).shape
            if found != shape:
                raise UsageError(
                    f"{path}: {_tensor(layer, kind)} has shape {list(found)}, expected {list(shape)}: {_MAKE_ONE}"
                )
    if calibration.final_D.shape != (config.model_dim,):
        found = calibration.final_D.shape
        raise UsageError(f"{path}: final has shape {list(found)}, expected [{config.model_dim}]: {_MAKE_ONE}")


def merge_files(paths: Sequence[Path]) -> Calibration:
    """Several calibrations of one model together: equal bytes whatever their order.

    Raises:
        UsageError: One cannot be read, two are of different models, or one is there twice.
    """
    read: dict[str, tuple[Path, Calibration]] = {}
    for path in paths:
        calibration = read_calibration(path)
        key = _checksum(_arrays(calibration)) + json.dumps(calibration.texts)
        if key in read:
            raise UsageError(f"--merge: {path} holds the same as {read[key][0]}: name each calibration once")
        read[key] = path, calibration
    first_path, first = next(iter(read.values()))
    for path, calibration in read.values():
        same_shapes = [array.shape for array in _arrays(calibration).values()] == [
            array.shape for array in _arrays(first).values()
        ]
        if calibration.fingerprint != first.fingerprint or not same_shapes:
            raise UsageError(
                f"--merge: {path} is of {calibration.model} ({calibration.fingerprint[:12]}), {first_path} of "
                f"{first.model} ({first.fingerprint[:12]}): merge calibrations of one model"
            )
    return merge([read[key][1] for key in sorted(read)])


def fingerprint_of(calibration: Calibration) -> str:
    """A text that tells calibrations with other sums apart."""
    return _checksum(_arrays(calibration))


def _arrays(calibration: Calibration) -> dict[str, npt.NDArray[Any]]:
    """All arrays by the name of their tensor, in file order."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for layer, moments in enumerate(calibration.layers):
        arrays |= {_tensor(layer, kind): array for kind, array in zip(_KINDS, moments.values(), strict=True)}
    return {**arrays, "final": calibration.final_D, "sensitive": calibration.sensitive_G}


def _from_arrays(metadata: dict[str, str], arrays: dict[str, npt.NDArray[Any]]) -> Calibration:
    count = (len(arrays) - 2) // len(_KINDS)
    if len(arrays) != count * len(_KINDS) + 2 or arrays["sensitive"].shape != (group_count(count),):
        raise ValueError(f"it has {len(arrays)} tensors")
    for name, array in arrays.items():
        _require_sums(name, array)
    layers = []
    for layer in range(count):
        moments = LayerMoments(**{kind: arrays[_tensor(layer, kind)] for kind in _KINDS})
        if moments.tokens_E.dtype != np.int64:
            raise ValueError(f"{_tensor(layer, 'tokens_E')} has type {moments.tokens_E.dtype}, expected int64")
        layers.append(moments)
    texts = tuple(str(text) for text in json.loads(metadata["texts"]))
    return Calibration(
        model=metadata["model"],
        fingerprint=metadata["fingerprint"],
        texts=texts,
        tokens=int(metadata["tokens"]),
        layers=tuple(layers),
        final_D=arrays["final"].astype(np.float64),
        sensitive_G=arrays["sensitive"].astype(np.float64),
        sensitive_tokens=int(metadata["sensitive_tokens"]),
    )


def _require_sums(name: str, array: npt.NDArray[Any]) -> None:
    if array.dtype not in (np.float64, np.int64) or not array.ndim:
        raise ValueError(f"{name} has type {array.dtype}")
    if not bool((np.isfinite(array) & (array >= 0)).all()):
        raise ValueError(f"{name} has sums that are negative or not finite")


def _tensor(layer: int, kind: str) -> str:
    return f"layers.{layer}.{kind.split('_')[0]}"


def _dtype(array: npt.NDArray[Any]) -> str:
    return "I64" if array.dtype == np.int64 else "F64"


def _bytes(array: npt.NDArray[Any]) -> bytes:
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def _checksum(arrays: dict[str, npt.NDArray[Any]]) -> str:
    parts = [f"{name} {list(array.shape)} {checksum_text(_bytes(array))}" for name, array in arrays.items()]
    return checksum_text("\n".join(parts).encode())
