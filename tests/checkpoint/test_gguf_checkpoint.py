"""GGUF files as checkpoints: the same model as from Hugging Face, exact values, and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from gguf.quants import GGMLQuantizationType, quantize

from dist_moe.checkpoint import source
from dist_moe.checkpoint.gguf_checkpoint import READABLE, GgufCheckpoint
from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.checkpoint.source import file_format, open_source
from dist_moe.errors import CheckpointError, EnvironmentMismatch
from helpers.tiny_gguf import DENSE, MOE, WIDE, write_gguf
from helpers.tiny_model import TinyModel

YARN = {
    ".rope.scaling.type": "yarn",
    ".rope.scaling.factor": 4.0,
    ".rope.scaling.original_context_length": 1024,
}


def gguf_name(logical: str) -> tuple[str, int | None]:
    """The tensor of a logical matrix, and the index of its expert."""
    names = {"embedding": "token_embd", "final_norm": "output_norm", "lm_head": "output"}
    if logical in names:
        return names[logical] + ".weight", None
    _, layer, *rest = logical.split(".")
    inner = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm", "o": "attn_output", "router": "ffn_gate_inp"}
    if rest[0] == "experts":
        return f"blk.{layer}.ffn_{rest[2]}_exps.weight", int(rest[1])
    return f"blk.{layer}.{inner.get(rest[0], 'attn_' + rest[0])}.weight", None


@pytest.mark.parametrize("model", [MOE, DENSE])
def test_the_same_model_as_from_hugging_face(tmp_path: Path, model: TinyModel) -> None:
    write_gguf(tmp_path / "m.gguf", model, "F32")
    theirs, ours = Checkpoint.open(model.write(tmp_path / "hf")), open_source(tmp_path / "m.gguf")
    expected, found = dataclasses.asdict(theirs.config), dataclasses.asdict(ours.config)
    if model is DENSE:
        expected["architecture"] = "Qwen3ForCausalLM"
        expected |= {"experts": 0, "experts_per_token": 0, "expert_hidden": 0}
    np.testing.assert_equal(found, expected)
    assert ours.names() == theirs.names()
    for name in ours.names():
        assert ours.shape(name) == theirs.shape(name)
        assert np.array_equal(ours.read(name), theirs.read(name)), name


def test_yarn_is_that_of_hugging_face(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", changes=YARN)
    config = open_source(tmp_path / "m.gguf").config
    scaled = Yarned(**dataclasses.asdict(MOE)).write(tmp_path / "hf")
    expected = Checkpoint.open(scaled).config
    assert np.array_equal(config.inv_freq, expected.inv_freq)
    assert config.attention_factor == expected.attention_factor


class Yarned(TinyModel):
    def config_json(self) -> dict[str, object]:
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
        return super().config_json() | {"rope_scaling": yarn}


@pytest.mark.parametrize("kind", READABLE)
def test_every_value_is_read_exactly(tmp_path: Path, kind: str) -> None:
    values = write_gguf(tmp_path / "m.gguf", WIDE if "K" in kind or kind == "IQ4_XS" else MOE, matrices=kind)
    checkpoint = open_source(tmp_path / "m.gguf")
    assert checkpoint.source_dtype("layers.0.q") == kind.lower()
    assert checkpoint.preferred_dtype() == kind.lower()
    for name in checkpoint.names():
        tensor, expert = gguf_name(name)
        expected = values[tensor] if expert is None else values[tensor][expert]
        assert np.array_equal(checkpoint.read(name), expected), name
        if expected.ndim == 2:
            rows, columns = slice(3, 41), slice(5, 49)
            part = checkpoint.read(name, rows, columns)
            assert part.flags.c_contiguous
            assert np.array_equal(part, expected[rows, columns])


def test_blocks_are_the_files_bits(tmp_path: Path) -> None:
    weights = np.random.default_rng(1).standard_normal((256, 64)).astype(np.float32)
    raw = quantize(weights, GGMLQuantizationType.Q4_0)
    write_gguf(tmp_path / "m.gguf", data={"blk.1.attn_q.weight": raw})
    blocks = open_source(tmp_path / "m.gguf").blocks("layers.1.q", slice(7, 9), slice(32, 64))
    assert blocks is not None
    assert blocks.bits == 4
    assert blocks.scale_RG.tobytes() + blocks.codes_RG.tobytes() == (
        raw[7:9, 18:20].tobytes() + raw[7:9, 20:36].tobytes()
    )


def test_blocks_are_whole_or_none(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    checkpoint = open_source(tmp_path / "m.gguf")
    assert checkpoint.blocks("layers.1.q", slice(None), slice(16, 64)) is None
    assert checkpoint.blocks("layers.1.router", slice(None), slice(None)) is None


def test_another_file_has_another_fingerprint(tmp_path: Path) -> None:
    for name, seed, kind in (("a", 1, "Q4_0"), ("b", 1, "Q4_0"), ("c", 2, "Q4_0"), ("d", 1, "Q8_0")):
        write_gguf(tmp_path / name, TinyModel(dense_layers=(), seed=seed), kind)
    prints = [open_source(tmp_path / name).fingerprint() for name in "abcd"]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


REFUSALS = {
    "architecture": ({"general.architecture": "llama"}, {}, 'general.architecture is "llama", expected "qwen3moe"'),
    "no layers": ({".block_count": None}, {}, "block_count is missing, expected a whole number"),
    "no experts": ({".expert_count": 0}, {}, "expert_count is 0, expected a whole number from 1"),
    "too many": ({".expert_used_count": 9}, {}, "expert_used_count is 9, expected at most expert_count = 8"),
    "heads": ({".attention.head_count_kv": 3}, {}, "expected a divisor of attention.head_count = 8"),
    "values": ({".attention.value_length": 64}, {}, "attention.value_length is 64, expected 32"),
    "shared": ({".expert_shared_count": 1}, {}, "expert_shared_count is 1, expected 0"),
    "rope": ({".rope.scaling.type": "linear"}, {}, 'rope.scaling.type is "linear", expected "none" or "yarn"'),
    "width": ({".embedding_length": 96}, {}, "has shape [300, 64], but the metadata makes it [300, 96]"),
    "more layers": ({".block_count": 3}, {}, "tensor blk.2.attn_norm.weight is missing"),
    "fewer layers": ({".block_count": 1}, {}, "has blk.1.attn_norm.weight (12 such), which is no tensor"),
    "millions": ({".expert_count": 10**6}, {}, "is said to have 2 layers of 1000000 experts, but has 27 tensors alone"),
    "thousands": ({".block_count": 5000}, {}, "is said to have 5000 layers of 8 experts, but has 27 tensors alone"),
    "billions": ({".block_count": 10**9}, {}, "block_count is 1000000000, expected at most 100000"),
    "split": ({"split.count": 3}, {}, "is one of 3 files of a split model; join them first"),
    "one type": ({}, {"output.weight": "TQ1_0"}, "1 of 15 tensors have a type that dist-moe does not read (1 TQ1_0): "),
    "types": (
        {},
        {"output.weight": "TQ2_0", "blk.0.attn_q.weight": "IQ2_XXS"},
        "(1 IQ2_XXS, 1 TQ2_0): blk.0.attn_q.weight is IQ2_XXS, output.weight is TQ2_0; expected F32, F16, BF16, Q8_0",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    changes, types, expected = REFUSALS[case]
    path = tmp_path / "m.gguf"
    model = WIDE if types else MOE
    write_gguf(path, model, changes={k: v for k, v in changes.items() if k != "general.architecture"}, types=types)
    if "general.architecture" in changes:
        path.write_bytes(path.read_bytes().replace(b"qwen3moe", b"llama3.x"))
        expected = expected.replace('"llama"', '"llama3.x"')
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_formats_are_told_by_content(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.bin")
    (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(100))
    assert file_format(tmp_path / "model.bin") == "GGUF"
    assert isinstance(open_source(tmp_path / "model.bin"), GgufCheckpoint)
    with pytest.raises(CheckpointError, match="it is a file that does not begin with GGUF"):
        open_source(tmp_path / "model.gguf")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    write_gguf(tmp_path / "m.gguf")
    for name in [name for name in sys.modules if name == "gguf" or name.startswith("dist_moe.checkpoint.gguf_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(EnvironmentMismatch, match="pip install 'dist-moe\\[gguf\\]'"):
        source.open_source(tmp_path / "m.gguf")
