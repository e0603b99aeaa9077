"""A reference that tools/make_reference.py wrote: a greedy trace of transformers, and of which model it is.

Shape suffixes: S steps, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_moe import files
from dist_moe.cli.npz_reading import open_npz, read_array
from dist_moe.cli.reference_trace import IDS, Trace, read_trace
from dist_moe.cli.token_ids import require_ids
from dist_moe.errors import UsageError
from dist_moe.model_config import ModelConfig

KIND = "dist-moe reference 1"
_WHAT, _ADVICE = "a reference trace", "make one with tools/make_reference.py, see docs/verify.md"
_NAMES = {
    "layers": "layers",
    "model_dim": "model dim",
    "heads": "query heads",
    "kv_heads": "KV heads",
    "head_dim": "head dim",
    "experts": "experts",
    "experts_per_token": "experts per token",
    "vocabulary": "vocabulary",
    "norm_topk_prob": "norm_topk_prob",
}


def read_reference(name: str, steps: int | None, config: ModelConfig) -> Trace:
    """Read a reference in any of its forms.

    Args:
        name: A .npz file of tools/make_reference.py, a directory with one such file or one trace, or what
            `read_trace` takes.
        steps: How many are compared; None: all that it has.
        config: The model.

    Raises:
        UsageError: It cannot be read, is of another model, or has fewer steps.
    """
    path = _in_directory(Path(name)) if files.is_directory(Path(name)) else Path(name)
    is_npz = path.suffix == ".npz"
    trace = _read_npz(path, config) if is_npz else read_trace(str(path), None, 1, config.vocabulary)
    found = len(trace.expected_ids)
    if steps is not None and steps > found:
        raise UsageError(f"--steps {steps}: {name} has {found} steps: give {found} at most")
    return trace


def check_sizes(path: Path, sizes: dict[str, Any], config: ModelConfig) -> None:
    """Refuse a reference of another model.

    Raises:
        UsageError: Names what differs.
    """
    for key, words in _NAMES.items():
        ours = getattr(config, key)
        if key in sizes and sizes[key] != ours:
            raise UsageError(
                f"{path}: is of another model: it has {words} {sizes[key]}, and this one {ours}: give the reference "
                "of this model, or with -m the model of this reference"
            )
    theirs_P = np.asarray(sizes.get("inv_freq", config.inv_freq), np.float64)
    if theirs_P.shape != config.inv_freq.shape or not np.allclose(theirs_P, config.inv_freq, rtol=1e-5):
        raise UsageError(
            f"{path}: is of another model: its rotary frequencies are others (rope_theta, YaRN or --rope-scaling): "
            "give the reference of this model, or with -m the model of this reference"
        )


def _read_npz(path: Path, config: ModelConfig) -> Trace:
    with open_npz(path, _WHAT, _ADVICE) as archive:
        facts = json.loads(str(read_array(archive, "facts")[()]))
        if not isinstance(facts, dict) or facts.get("kind") != KIND:
            raise ValueError(f"its facts do not say {KIND!r}")
        sizes = dict(facts["sizes"])
        prompt, expected, logits_SV = (read_array(archive, key) for key in ("prompt_ids", "expected_ids", "logits"))
        check_sizes(path, sizes, config)
    for key, ids in (("prompt_ids", prompt), ("expected_ids", expected)):
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
            raise UsageError(f"{path}: {key}: expected token ids, found {ids.dtype} {list(ids.shape)}: {_ADVICE}")
        require_ids(ids.tolist(), config.vocabulary, f"{path}: {key}")
    if logits_SV.dtype.kind != "f" or logits_SV.shape != (len(expected), config.vocabulary):
        raise UsageError(
            f"{path}: logits: expected floats [{len(expected)}, {config.vocabulary}], a row per step, found "
            f"{logits_SV.dtype} {list(logits_SV.shape)}: {_ADVICE}"
        )
    return Trace(tuple(prompt.tolist()), tuple(expected.tolist()), 0, logits_SV, _softmax(logits_SV))


def _softmax(logits_SV: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    out_SV = np.empty(logits_SV.shape, np.float32)
    for s, logits_V in enumerate(logits_SV.astype(np.float64, copy=False)):
        exponentials_V = np.exp(logits_V - logits_V.max())
        out_SV[s] = exponentials_V / exponentials_V.sum()
    return out_SV


def _in_directory(directory: Path) -> Path:
    """The one reference in a directory."""
    found = sorted(path for path in directory.iterdir() if path.suffix == ".npz" or path.name.endswith(IDS))
    if len(found) != 1:
        what = ", ".join(path.name for path in found[:4]) or "none"
        raise UsageError(
            f"{directory}: expected one reference (.npz) or one trace ({IDS}) in it, found {what}: name it"
        )
    return found[0]
