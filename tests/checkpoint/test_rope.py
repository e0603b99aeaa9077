"""Rotary frequencies against the bits that transformers computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dist_moe.checkpoint.fields import Fields
from dist_moe.checkpoint.hf_rope import rope_settings
from dist_moe.checkpoint.rope import RopeSettings, Yarn, rope_frequencies, rounded_powers

# 1 / theta ** (2 i / 128) as torch 2.13.0 computes it with AVX2 and with AVX-512, where that differs from its plain
# build: python -c "import torch; print((1 / 1e6 ** (torch.arange(0, 128, 2).float() / 128))[37].view(torch.int32))"
VECTOR_BITS = {1e6: {37: 0x39B229FB}, 5e6: {19: 0x3C282311}, 1e7: {}, 1e4: {}}


def golden_cases() -> list[str]:
    """The names of the real models' settings in yarn_full.npz."""
    with np.load(Path(__file__).parent.parent / "golden" / "yarn_full.npz") as arrays:
        return list(json.loads(str(arrays["cases"])))


@pytest.mark.parametrize("case", golden_cases())
def test_frequencies_are_transformers_bits(case: str, golden: Path) -> None:
    with np.load(golden / "yarn_full.npz") as arrays:
        config = json.loads(str(arrays["cases"]))[case]
        expected, factor = arrays[f"{case}_inv_freq"], arrays[f"{case}_attention_factor"]
    # transformers falls back to 10000 where we refuse a config without a base.
    config = {"rope_theta": 10000.0} | config
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    settings = rope_settings(Fields("config.json", config), head_dim, config["max_position_embeddings"])
    inv_freq, attention_factor = rope_frequencies(settings)
    assert inv_freq.dtype == np.float32
    assert inv_freq.view(np.uint32).tolist() == expected.view(np.uint32).tolist()
    assert attention_factor == np.float32(factor)


@pytest.mark.parametrize(("name", "head_dim"), [("default", 32), ("yarn", 48)])
def test_frequencies_of_the_rotation_goldens(name: str, head_dim: int, golden: Path) -> None:
    with np.load(golden / "rope.npz") as arrays:
        settings = json.loads(str(arrays["settings"]))[name]
        expected, factor = arrays[f"{name}_inv_freq"], arrays[f"{name}_attention_factor"]
    fields = Fields("config.json", {"rope_parameters": settings})
    inv_freq, attention_factor = rope_frequencies(rope_settings(fields, head_dim, 40960))
    assert inv_freq.view(np.uint32).tolist() == expected.view(np.uint32).tolist()
    assert attention_factor == np.float32(factor)


@pytest.mark.parametrize("theta", VECTOR_BITS)
def test_torch_vector_builds_are_one_ulp_away_in_known_places(theta: float) -> None:
    bits = rope_frequencies(RopeSettings(128, theta))[0].view(np.uint32).astype(np.int64)
    for index, expected in VECTOR_BITS[theta].items():
        assert abs(int(bits[index]) - expected) == 1


def test_powers_are_correctly_rounded() -> None:
    exponents = np.arange(0, 128, 2).astype(np.float32) / np.float32(128)
    powers = rounded_powers(1e6, exponents)
    below, above = np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf))
    exact = np.exp(exponents.astype(np.longdouble) * np.log(np.longdouble(1e6)))
    error = np.abs(powers - exact)
    assert (error <= np.abs(below - exact)).all()
    assert (error <= np.abs(above - exact)).all()


# head_dim 16, theta 1e4, factor 4, from Qwen3MoeRotaryEmbedding under ATEN_CPU_CAPABILITY=default. The first ramp has
# no width (0 to 0), the second one ends beyond the last dimension and is cut there.
EDGE_BITS = {
    (6, 32.0): "3F800000 3DA1E89B 3CCCCCCD 3C0186E3 3B23D70A 3A4F3E38 3983126F 38A5CB60",
    (2**30, 1e6): "3F800000 3EA1E89B 3DCCCCCD 3D0186E3 3C23D70A 3B411CE2 3A6265A8 3983E1C7",
}


@pytest.mark.parametrize(("original", "beta_fast"), EDGE_BITS)
def test_ramps_at_the_edges(original: int, beta_fast: float) -> None:
    yarn = Yarn(factor=4.0, original_max_position_embeddings=original, beta_fast=beta_fast)
    inv_freq, _ = rope_frequencies(RopeSettings(16, 1e4, yarn))
    assert [f"{bits:08X}" for bits in inv_freq.view(np.uint32)] == EDGE_BITS[original, beta_fast].split()
