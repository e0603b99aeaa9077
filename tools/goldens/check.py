"""Loads everything afresh and compares it with what is stored."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from goldens import parts, rope
from goldens.build import load, logits_of
from goldens.demo import fingerprint
from goldens.specs import SPECS, Spec

LEAST_MARGIN = 2e-3
LARGEST_ERROR = 5e-6


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest |b|."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def check_trace(directory: Path, golden: Path, least_margin: float) -> str:
    """Compares a golden with a fresh fp32 load, an fp64 load and transformers' own generate()."""
    with np.load(golden) as arrays:
        stored = {key: torch.from_numpy(arrays[key]) for key in arrays if arrays[key].dtype.kind != "U"}
    ids = stored["ids"].long()[None]
    exact = load(directory, torch.float64)
    error = gap(logits_of(load(directory), ids)[0], stored["logits"])
    error64 = gap(stored["logits"], logits_of(exact, ids)[0])
    prompt = stored["prompt_ids"].long()[None]
    steps = len(stored["greedy_ids"])
    settings = {"do_sample": False, "max_new_tokens": steps, "min_new_tokens": steps, "pad_token_id": 0}
    for model in (load(directory), exact):
        model.generation_config.eos_token_id = None
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert torch.equal(out[0, prompt.shape[1] :], stored["greedy_ids"].long()), f"{directory.name}: greedy differs"
    assert max(error, error64) <= LARGEST_ERROR, f"{directory.name}: logits differ by {error}, {error64}"
    assert float(stored["min_margin"]) >= least_margin, f"{directory.name}: margin {stored['min_margin']}"
    return f"T {ids.shape[1]}  refound {error:.0e}  to fp64 {error64:.0e}  margin {float(stored['min_margin']):.1e}"


def check_layout(spec: Spec, directory: Path) -> None:
    """Checks that the files are laid out as the spec says: dtype, fused or not, shards, spelling."""
    dtypes, names = set(), set()
    files = sorted(directory.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
            dtypes |= {str(tensors.get_tensor(key).dtype) for key in tensors.keys()}  # noqa: SIM118
    config = json.loads((directory / "config.json").read_text())
    assert dtypes == {f"torch.{spec.dtype}"}, dtypes
    assert any(".experts.gate_up_proj" in name for name in names) == spec.fused
    assert any(".experts.0.gate_proj" in name for name in names) == (not spec.fused and not spec.dense)
    assert (len(files) > 1) == bool(spec.shard_size) == (directory / "model.safetensors.index.json").exists()
    old_keys = [key in config for key in ("rope_theta", "rope_scaling", "torch_dtype")]
    assert all(old_keys) if spec.old_spelling else not any(old_keys)
    assert ("rope_parameters" in config) != spec.old_spelling
    assert ("lm_head.weight" in names) != bool(spec.config.get("tie_word_embeddings"))


def check_parts(golden: Path) -> None:
    """Computes every part again and compares it array by array."""
    with tempfile.TemporaryDirectory() as name:
        again = Path(name)
        parts.write_parts(again)
        rope.write_rope(again)
        for file in sorted(again.glob("*.npz")):
            with np.load(file) as new, np.load(golden / file.name) as old:
                assert sorted(new) == sorted(old), file.name
                worst = max((check_array(f"{file.name} {key}", new[key], old[key]) for key in new), default=0.0)
            print(f"{file.stem:16} refound {worst:.0e}")


def check_array(name: str, new: np.ndarray, old: np.ndarray) -> float:
    """Compares one array: floats nearly, frequencies and everything else exactly."""
    if new.dtype.kind != "f" or "inv_freq" in name or "factor" in name:
        assert np.array_equal(new, old), f"{name} differs"
        return 0.0
    error = float(np.abs(new - old).max() / max(float(np.abs(old).max()), 1e-30))
    assert error <= LARGEST_ERROR, f"{name} differs by {error}"
    return error


def check_all(golden: Path, demo: Path) -> None:
    """Checks the parts and every model; the demo if it is there."""
    check_parts(golden)
    for spec in SPECS:
        directory = golden / "models" / spec.name
        check_layout(spec, directory)
        print(f"{spec.name:16}", check_trace(directory, directory / "golden.npz", LEAST_MARGIN), flush=True)
    if (golden / "demo.npz").exists():
        with np.load(golden / "demo.npz") as arrays:
            assert str(arrays["model_sha256"]) == fingerprint(demo / "model"), "demo.npz is of other weights: --demo"
        print(f"{'demo':16}", check_trace(demo / "model", golden / "demo.npz", 0.0))
