"""Checkpoint directories: the same arrays from every layout."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_moe.checkpoint.reader import Checkpoint
from dist_moe.errors import CheckpointError

MakeSource = Callable[..., Any]


def hf_name(name: str, dense: set[int]) -> str:
    """Hugging Face's per-expert name of a logical matrix, written out apart from the code under test."""
    fixed = {"embedding": "model.embed_tokens.weight", "lm_head": "lm_head.weight", "final_norm": "model.norm.weight"}
    if name in fixed:
        return fixed[name]
    _, layer, kind, *rest = name.split(".")
    at = f"model.layers.{layer}."
    if kind == "experts":
        expert, part = rest
        return f"{at}mlp.{part}_proj.weight" if int(layer) in dense else f"{at}mlp.experts.{expert}.{part}_proj.weight"
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "router": "mlp.gate"}
    if kind in norms:
        return f"{at}{norms[kind]}.weight"
    if kind.endswith("_norm"):
        return f"{at}self_attn.{kind}.weight"
    return f"{at}self_attn.{kind[0]}_proj.{'bias' if kind.endswith('_bias') else 'weight'}"


def check_values(checkpoint: Checkpoint, source: Any) -> None:
    """Every logical matrix is the source's."""
    dense = set(checkpoint.config.dense_layers)
    read = set()
    for name in checkpoint.names():
        tensor = "model.embed_tokens.weight" if name == "lm_head" and source.config["tie_word_embeddings"] else None
        tensor = tensor or hf_name(name, dense)
        read.add(tensor)
        values = checkpoint.read(name)
        assert values.dtype == np.float32
        assert values.flags.c_contiguous
        assert values.flags.writeable
        assert checkpoint.shape(name) == values.shape
        assert np.array_equal(values, source.values[tensor]), name
    assert read == set(source.values)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("layout", ["each", "fused", "mixed"])
@pytest.mark.parametrize("shards", [0, 1, 3])
def test_moe(dtype: str, layout: str, shards: int, make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(dtype=dtype)
    source.fuse({"each": range(0), "fused": range(2), "mixed": range(1, 2)}[layout])
    checkpoint = Checkpoint.open(source.write(tmp_path, shards))
    check_values(checkpoint, source)
    assert {checkpoint.source_dtype(name) for name in checkpoint.names()} == {dtype.lower()}
    assert checkpoint.total_bytes == sum(values.nbytes for values in source.values.values()) * (
        1 if dtype == "F32" else 0.5
    )
    assert checkpoint.path == tmp_path


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("moe", {"attention_bias": True}),
        ("moe", {"tie_word_embeddings": True}),
        ("moe", {"mlp_only_layers": [0]}),
        ("moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4, "mlp_only_layers": [3]}),
        ("moe", {"hidden_size": 24, "num_key_value_heads": 4, "head_dim": 2}),
        ("dense", {}),
        ("dense", {"attention_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_switches(base: str, changes: dict[str, Any], make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(base, **changes)
    check_values(Checkpoint.open(source.write(tmp_path)), source)


def test_slices_of_rows_and_columns(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    source.fuse(range(1))
    checkpoint = Checkpoint.open(source.write(tmp_path))
    prefix = "model.layers.0.mlp.experts.2."
    for part in ("gate", "up", "down"):
        whole = source.values[f"{prefix}{part}_proj.weight"]
        for rows, columns in (
            (slice(1, 4), None),
            (None, slice(2, 5)),
            (slice(3, 5), slice(0, 1)),
            (slice(2, 2), None),
        ):
            values = checkpoint.read(f"layers.0.experts.2.{part}", rows, columns)
            assert values.flags.c_contiguous
            expected = whole[slice(None) if rows is None else rows, slice(None) if columns is None else columns]
            assert np.array_equal(values, expected)
    norm = checkpoint.read("layers.1.q_norm", slice(1, 3))
    assert np.array_equal(norm, source.values["model.layers.1.self_attn.q_norm.weight"][1:3])


def test_raw_views_are_the_bits_of_the_file(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    raw = Checkpoint.open(source.write(tmp_path)).raw("embedding")
    assert raw.dtype == np.uint16
    assert not raw.flags.writeable
    assert np.array_equal(raw, source.tensors["model.embed_tokens.weight"][1])


def test_every_bf16_and_f16_value_is_widened_exactly(make_source: MakeSource, tmp_path: Path) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    for dtype, values in (("BF16", bits), ("F16", bits.view(np.float16))):
        source = make_source(vocab_size=64, hidden_size=1024)
        source.tensors["model.embed_tokens.weight"] = (dtype, values.reshape(64, 1024))
        widened = Checkpoint.open(source.write(tmp_path / dtype)).read("embedding").ravel()
        if dtype == "BF16":
            assert np.array_equal(widened.view(np.uint32), bits.astype(np.uint32) << 16)
        else:
            kept = ~np.isnan(values)
            assert np.array_equal(widened.astype(np.float16).view(np.uint16)[kept], bits[kept])
            assert np.isnan(widened[~kept]).all()


def test_a_slice_of_a_huge_tensor_costs_its_size(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(dtype="F32")
    rows = 2**24
    header = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [rows, 10], "data_offsets": [0, rows * 20]}}
    header["lm_head.weight"] = {"dtype": "BF16", "shape": [rows, 10], "data_offsets": [rows * 20, rows * 40]}
    text = json.dumps(header).encode()
    source.config["vocab_size"] = rows
    for name in header:
        del source.tensors[name]
    source.write(tmp_path, shards=1)
    with (tmp_path / "big.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + rows * 40)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"] |= dict.fromkeys(header, "big.safetensors")
    index_path.write_text(json.dumps(index))
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoint = Checkpoint.open(tmp_path)
    assert not checkpoint.read("lm_head", slice(rows - 3, rows)).any()
    assert checkpoint.total_bytes > rows * 40
    assert len(checkpoint.fingerprint()) == 64
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 64 * 1024


def test_tied_with_an_equal_head_is_tied(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(tie_word_embeddings=True, vocab_size=5000)
    dtype, values = source.tensors["model.embed_tokens.weight"]
    source.tensors["lm_head.weight"] = (dtype, values.copy())
    checkpoint = Checkpoint.open(source.write(tmp_path / "bf16"))
    assert checkpoint.config.tied_embeddings is True
    assert checkpoint.total_bytes == sum(array.nbytes for array in source.values.values()) // 2
    source.tensors["lm_head.weight"] = ("F32", source.values["model.embed_tokens.weight"])
    assert Checkpoint.open(source.write(tmp_path / "f32")).config.tied_embeddings is True


@pytest.mark.parametrize("row", [0, 4096, 4999])
def test_tied_with_another_head_uses_that_head(row: int, make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(tie_word_embeddings=True, vocab_size=5000)
    dtype, values = source.tensors["model.embed_tokens.weight"]
    head = values.copy()
    head[row, 3] ^= 1
    source.tensors["lm_head.weight"] = (dtype, head)
    checkpoint = Checkpoint.open(source.write(tmp_path))
    assert checkpoint.config.tied_embeddings is False
    assert np.array_equal(checkpoint.raw("lm_head"), head)
    assert np.array_equal(checkpoint.raw("embedding"), values)


def test_known_buffers_are_ignored(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    for name in ("model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"):
        source.tensors[name] = ("F32", np.ones(3, np.float32))
    checkpoint = Checkpoint.open(source.write(tmp_path))
    check_values(checkpoint, source)
    assert checkpoint.total_bytes == sum(values.nbytes for values in source.values.values()) // 2


def test_one_file_goes_before_an_index(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    source.write(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    check_values(Checkpoint.open(tmp_path), source)


def test_additional_chat_templates_become_one_file(make_source: MakeSource, tmp_path: Path) -> None:
    make_source().write(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("größer", encoding="utf-8")
    texts = Checkpoint.open(tmp_path).text_files()
    assert json.loads(texts["additional_chat_templates.json"]) == {"rag": "größer"}
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"rag\.jinja: cannot be read as text"):
        Checkpoint.open(tmp_path).text_files()


def test_text_files(make_source: MakeSource, tmp_path: Path) -> None:
    make_source().write(tmp_path)
    for name in ("merges.txt", "tokenizer.json", "README.md", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    texts = Checkpoint.open(tmp_path).text_files()
    assert list(texts) == ["tokenizer.json", "generation_config.json", "config.json", "merges.txt"]
    assert texts["merges.txt"] == b"{}"


def test_fingerprint(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source()
    prints = [Checkpoint.open(source.write(tmp_path / name, shards=2)).fingerprint() for name in "ab"]
    assert prints[0] == prints[1]
    prints.append(Checkpoint.open(source.write(tmp_path / "c", shards=3)).fingerprint())
    source.tensors["lm_head.weight"][1][3, 3] ^= 1
    prints.append(Checkpoint.open(source.write(tmp_path / "d", shards=2)).fingerprint())
    source.config["rms_norm_eps"] = 1e-5
    prints.append(Checkpoint.open(source.write(tmp_path / "e", shards=2)).fingerprint())
    assert len(set(prints)) == 4
    assert all(len(text) == 64 for text in prints)


def golden_models() -> list[Path]:
    """The tiny models that transformers wrote."""
    return sorted((Path(__file__).parent.parent / "golden" / "models").iterdir())


@pytest.mark.parametrize("directory", golden_models(), ids=lambda path: path.name)
def test_golden_models_open(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    config, written = checkpoint.config, json.loads((directory / "config.json").read_text())
    assert config.architecture == written["architectures"][0]
    assert config.attention_bias == written["attention_bias"]
    assert config.tied_embeddings == written["tie_word_embeddings"]
    assert config.norm_topk_prob == written.get("norm_topk_prob", False)
    assert config.experts == written.get("num_experts", written.get("num_local_experts", 0))
    assert checkpoint.read("embedding").shape == (written["vocab_size"], written["hidden_size"])
    for name in checkpoint.names():
        assert np.isfinite(checkpoint.read(name)).all()
        assert checkpoint.read(name).any()


def test_golden_models_meet_every_layout(golden: Path) -> None:
    checkpoints = {path.name: Checkpoint.open(path) for path in golden_models()}
    assert {item.source_dtype("embedding") for item in checkpoints.values()} == {"bf16", "f16", "f32"}
    assert checkpoints["yarn_mlp_only"].config.dense_layers == (0,)
    assert checkpoints["old_yarn_type"].config.dense_layers == (0, 2)
    assert checkpoints["old_yarn_type"].config.attention_factor == np.float32(1.138629436111989)
    assert checkpoints["old_f16_bias"].config.head_dim == 16
    assert checkpoints["dense_tied"].config.experts == 0


def test_a_golden_model_survives_a_copy(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "models" / "base", tmp_path / "copy")
    original, copy = Checkpoint.open(golden / "models" / "base"), Checkpoint.open(tmp_path / "copy")
    assert original.fingerprint() == copy.fingerprint()
